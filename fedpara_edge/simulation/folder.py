"""The run folder: the files of a simulation, and the lock by which only one process at a time works in it.

plan.toml           copy of the plan; another one must be a growth of it (`growth`)
metrics.jsonl       what was measured (`metrics`)
report.html, *.png  the report
work/               what the federations need; may be deleted when the run is done and is not to grow
    .lock           held by the simulation and its workers; empty. No arm has a name with a dot in front
    .data/seed-<s>/                                   rows of the clients (`clients`), common to all arms
    <arm>/seed-<s>/bundle/
    <arm>/seed-<s>/weights/round-<n>.safetensors      weights after n rounds, the last of them
    <arm>/seed-<s>/server/round-<n>.safetensors       server state that belongs with them
    <arm>/seed-<s>/control/round-<n>.safetensors      its part that devices need for scaffold
    <arm>/seed-<s>/changes/round-<n>.safetensors      from the weights of the round before to these
    <arm>/seed-<s>/clients/<client>/state/            the device's state folder
    <arm>/seed-<s>/clients/<client>/round-<n>.safetensors
                                                      weights of the client's own, in an arm that is local_only
    <arm>/seed-<s>/clients/<client>/start.safetensors the same as those of the round under way, while it trains
    <arm>/seed-<s>/updates/<client>.safetensors       of the round under way
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.errors import InputError
from fedpara_edge.simulation.growth import check_growth
from fedpara_edge.simulation.metrics import Event, Journal
from fedpara_edge.simulation.plan.plan import first_difference, read_tables
from fedpara_edge.storage.atomic import remove_leftovers_in, replacing_file
from fedpara_edge.storage.locking import hold, make_folder
from fedpara_edge.storage.rounds import remove_rounds_before, round_path, rounds_in

PLAN = "plan.toml"
METRICS = "metrics.jsonl"
PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def plan(self) -> Path:
        """The copy of the plan."""
        return self.path / PLAN

    @property
    def metrics(self) -> Path:
        """The metrics (`metrics`)."""
        return self.path / METRICS

    @property
    def lock(self) -> Path:
        """The lock, held as long as anybody works in the folder."""
        return self.path / "work" / ".lock"

    def data(self, seed: int) -> Path:
        """Folder with the clients' rows of a seed."""
        return self.path / "work" / ".data" / f"seed-{seed}"

    def job(self, arm: str, seed: int) -> JobFolder:
        """Folder of one arm with one seed."""
        return JobFolder(self.path / "work" / arm / f"seed-{seed}")


@dataclass(frozen=True)
class JobFolder:
    """The folder of one arm with one seed.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def bundle(self) -> Path:
        """The bundle folder."""
        return self.path / "bundle"

    def weights(self, number: int) -> Path:
        """Weights after `number` rounds, from 1 on."""
        return round_path(self.path / "weights", number)

    @property
    def server(self) -> Path:
        """The server's state folder."""
        return self.path / "server"

    def change(self, number: int) -> Path:
        """Change from the weights of the round before to those after `number` rounds."""
        return round_path(self.path / "changes", number)

    def control(self, number: int) -> Path:
        """Server state that devices need for scaffold besides the weights after `number` rounds."""
        return round_path(self.path / "control", number)

    def update(self, client: str) -> Path:
        """A client's update of the round under way."""
        return self.path / "updates" / f"{client}.safetensors"

    def state(self, client: str) -> Path:
        """A client's state folder."""
        return self.path / "clients" / client / "state"

    def own_weights(self, client: str, number: int) -> Path:
        """A client's own weights after `number` rounds, in an arm that is local_only."""
        return round_path(self.path / "clients" / client, number)

    def make(self, clients: tuple[str, ...]) -> None:
        """Make the folders that are missing."""
        for name in ("weights", "server", "control", "changes", "updates"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        for client in clients:
            (self.path / "clients" / client).mkdir(parents=True, exist_ok=True)

    def clear(self, number: int) -> None:
        """Remove what only rounds before `number` needed: their updates, weights, server states and changes."""
        shutil.rmtree(self.path / "updates", ignore_errors=True)
        (self.path / "updates").mkdir()
        for name in ("weights", "server", "control", "changes"):
            remove_rounds_before(self.path / name, number)
        for client in (self.path / "clients").iterdir():
            # A client's own may be older: of the round that it last took part in.
            remove_rounds_before(client, newest_until(client, number))


def newest_until(folder: Path, number: int) -> int:
    """The newest round up to one of which a folder has the file; 0 if there is none."""
    return max((found for found in rounds_in(folder) if found <= number), default=0)


@contextmanager
def open_run(path: Path, plan: Path, *, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[RunFolder]:
    """Make a run folder or go on in one, for as long as the context lasts.

    A run that has measured nothing yet begins again, so that a plan or data that were refused can be corrected; so does
    what was added to one that has.

    Args:
        path: Run folder.
        plan: Plan file; copied, once it was compared with the copy that is there.
        patience_seconds: Time that the workers of a run that was killed get to end.

    Raises:
        InputError: The folder has something else in it, or the run can't grow to the plan.
        BusyError: Another process works in it.
    """
    run = RunFolder(path)
    if path.exists() and not run.plan.is_file() and not (path.is_dir() and all(map(_is_leftover, path.iterdir()))):
        raise InputError(f"{path}: expected a new folder or that of an earlier run, found another; choose another name")
    tables = read_tables(plan)
    make_folder(run.lock.parent, kind="a run")
    with hold(run.lock, folder=path, kind="a run", patience_seconds=patience_seconds):
        remove_leftovers_in(path)
        is_new = not run.plan.is_file() or first_difference(read_tables(run.plan), tables) is not None
        events = Journal(run.metrics).events
        if events:
            check_growth(run.plan, plan, events)
        _remove_what_may_have_changed(run, events, models=is_new)
        if is_new:
            with replacing_file(run.plan) as temporary:
                shutil.copyfile(plan, temporary)
        yield run


def _remove_what_may_have_changed(run: RunFolder, events: Sequence[Event], *, models: bool) -> None:
    """Remove the data, and the bundles if the plan is another, of the seeds and arms that have not begun."""
    seeds = {run.data(event["seed"]) for event in events}
    jobs = {run.job(event["arm"], event["seed"]).path for event in events}
    for arm in run.lock.parent.iterdir():
        is_data = arm == run.data(0).parent
        if arm.is_dir() and (is_data or models):
            for made in arm.iterdir():
                if made.is_dir() and made not in (seeds if is_data else jobs):
                    shutil.rmtree(made)


def _is_leftover(path: Path) -> bool:
    """Whether it is of a run that was cut short before it had a plan: of its copy, or the lock."""
    is_work = path.name == "work" and path.is_dir()
    return path.name.startswith(f".{PLAN}.") or (is_work and {p.name for p in path.iterdir()} <= {".lock"})
