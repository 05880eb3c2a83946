"""Metrics of a run for the trackers that people have, round by round.

A `Sink` takes the numbers of one round of one series, an arm with a seed. There is one for TensorBoard, which writes
event files; a sink for another tracker is a class with the same two methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedpara_edge.errors import InputError
from fedpara_edge.installation import install_line
from fedpara_edge.report.rows import KEYS, read_metrics

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
        folder: Folder for them.

    Raises:
        InputError: The package tensorboardX is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError(f"expected tensorboardX, found none ({error}); {install_line('tracking')}") from error
        self._open: Callable[[str], Any] = lambda series: SummaryWriter(str(folder / series), flush_secs=1)
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


def track(run: Path, sink: Sink, *, follow: bool = False) -> int:
    """Give the rounds of a run to a tracker, and close it; the number of rounds.

    Args:
        run: Run folder; the run may be unfinished.
        sink: Tracker.
        follow: Whether to go on with rounds that are yet to come, until this is interrupted.

    Raises:
        InputError: Plan or metrics are missing or damaged, or no arm has begun.
        KeyboardInterrupt: Interrupted, with `follow`.
    """
    done: set[tuple[str, int]] = set()
    try:
        while True:
            for row in read_metrics(run):
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
