"""Metrics of a run for the trackers that people have, round by round.

What is tracked is `metrics.jsonl` (`fedpara_edge.simulation.metrics`), whoever writes it: a simulation, a fleet or a
server. A `Sink` takes the numbers of one round of one series, an arm with a seed; a sink for another tracker is a class
with the same two methods, and an entry in `TRACKERS`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedpara_edge.errors import InputError, brief_text
from fedpara_edge.installation import install_line
from fedpara_edge.report.results import read_arms
from fedpara_edge.report.rows import KEYS, rows_of
from fedpara_edge.simulation.folder import METRICS
from fedpara_edge.storage.atomic import check_output
from fedpara_edge.storage.locking import make_folder
from fedpara_edge.storage.wholefile import real_path

POLL_SECONDS = 1.0


class Sink(Protocol):
    """A tracker of numbers."""

    def write(self, series: str, round: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a round.

        Args:
            series: Arm and seed, as `arm/seed-0`.
            round: Round, from 1 on.
            values: Finite numbers by name.
        """

    def close(self) -> None:
        """Write what is still to be written."""


class TensorBoard:
    """TensorBoard's event files: a folder for each series, a scalar for each number.

    Args:
        place: Folder for them.
        name: Name of the run, which TensorBoard takes from the folder.

    Raises:
        InputError: The package tensorboardX is not installed.
    """

    def __init__(self, place: str, name: str) -> None:  # noqa: ARG002
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboardX", "tracking", error) from error
        self._open: Callable[[str], Any] = lambda series: SummaryWriter(str(Path(place, series)), flush_secs=1)
        self._writers: dict[str, Any] = {}

    def write(self, series: str, round: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a round."""
        if series not in self._writers:
            self._writers[series] = self._open(series)
        for name, value in values.items():
            self._writers[series].add_scalar(name, value, round)

    def close(self) -> None:
        """Write what is still to be written."""
        for writer in self._writers.values():
            writer.close()


class MLflow:
    """MLflow: an experiment with the name of the run, in it a run for each series.

    Args:
        place: Tracking URI, such as that of a server, or a file for a database.
        name: Name of the experiment.

    Raises:
        InputError: The package mlflow is not installed, or refuses the URI.
    """

    def __init__(self, place: str, name: str) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError as error:
            raise _missing("mlflow", "mlflow", error) from error
        self._metric = Metric
        try:
            self._client = MlflowClient(place if "://" in place else f"sqlite:///{Path(place).absolute()}")
            found = self._client.get_experiment_by_name(name)
            self._experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        except (MlflowException, SQLAlchemyError) as error:
            raise InputError(
                f"expected a place that MLflow can use, found {place}: {brief_text(str(error))}"
            ) from error
        self._runs: dict[str, str] = {}

    def write(self, series: str, round: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a round."""
        if series not in self._runs:
            self._runs[series] = self._client.create_run(self._experiment, run_name=series).info.run_id
        now = int(1000 * time.time())
        # MLflow takes fewer characters in a name than a layer may have in its own.
        metrics = [self._metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, round) for name, value in values.items()]
        self._client.log_batch(self._runs[series], metrics)

    def close(self) -> None:
        """Write what is still to be written."""
        for run in self._runs.values():
            self._client.set_terminated(run)


class WandB:
    """Weights & Biases in offline mode: a project with the name of the run, in it a run for each series.

    Args:
        place: Folder for the files that `wandb sync` sends.
        name: Name of the project.

    Raises:
        InputError: The package wandb is not installed.
    """

    def __init__(self, place: str, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb", error) from error
        folder = Path(place)
        make_folder(folder, kind="a folder for Weights & Biases")
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)

        def start(series: str) -> Any:
            return wandb.init(
                project=name, name=series, dir=folder, mode="offline", reinit="create_new", settings=quiet
            )

        self._start, self._runs = start, dict[str, Any]()

    def write(self, series: str, round: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a round."""
        if series not in self._runs:
            self._runs[series] = self._start(series)
        self._runs[series].log(dict(values), step=round)

    def close(self) -> None:
        """Write what is still to be written."""
        for run in self._runs.values():
            run.finish()


TRACKERS: Mapping[str, Callable[[str, str], Sink]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
"""Sinks by name; each is made of a place and the name of the run."""


def open_sink(tracker: str, run: Path) -> Sink:
    """The sink that `KIND:PLACE` names.

    Args:
        tracker: Tracker and place, such as `tensorboard:board`.
        run: Run folder.

    Raises:
        InputError: There is no such tracker, something else is at its place, or its package is not installed.
    """
    kind, _, place = tracker.partition(":")
    if kind not in TRACKERS or not place:
        raise InputError(
            f"expected one of {', '.join(TRACKERS)} with a place, as in tensorboard:FOLDER, found {tracker!r}",
            key="track",
        )
    if "://" not in place:
        check_output(Path(place), overwrite=True, folder=kind != "mlflow")
    return TRACKERS[kind](place, real_path(run).name)


def track(run: Path, sink: Sink, *, follow: bool = False) -> int:
    """Give the rounds of a run to a tracker, and close it; the number of rounds.

    Args:
        run: Run folder; the run may be unfinished.
        sink: Tracker.
        follow: Whether to go on with rounds that are yet to come, until this is interrupted.

    Raises:
        InputError: The metrics are missing or damaged, or no arm has begun.
        KeyboardInterrupt: Interrupted, with `follow`.
    """
    done: set[tuple[str, int]] = set()
    try:
        while True:
            for row in rows_of(read_arms(run / METRICS)):
                series = f"{row['arm']}/seed-{row['seed']}"
                if (series, row["round"]) not in done:
                    done.add((series, row["round"]))
                    sink.write(series, row["round"], _numbers(row))
            if not follow:
                return len(done)
            time.sleep(POLL_SECONDS)
    finally:
        sink.close()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    kinds = (int, float)
    return {
        name: float(value)
        for name, value in row.items()
        if name not in KEYS and type(value) in kinds and not name.startswith("full_ranks.")
    }


def _missing(package: str, extra: str, error: ImportError) -> InputError:
    return InputError(f"expected {package}, found none ({error}); {install_line(extra)}", key="track")
