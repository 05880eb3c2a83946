"""`metrics.jsonl`: what was measured, one JSON object a line; the only memory of which rounds are done.

Every line has "event", "arm" and "seed". Numbers that were not measured, or are not finite, are null.

    arm      what the federation is: model, kind, gamma, algorithm, weighting (of the devices; null in an arm that is
             local_only), codec, downlink_codec, shared_parameters, personal_parameters, dense_parameters, clients,
             left_out (owners of too few rows to be clients), participants, local_only; full_ranks: {layer: largest
             rank that a weight of its shape can have}, of the factored layers; engine, such as torch:cuda:float32,
             where it is not the plan's; rounds, where a server and no plan says how many, null for no end
    round    round (from 1 on); accuracy and loss (null where not evaluated); train_loss, of the last local epoch, mean
             over participants weighted by examples; up_bytes and down_bytes, of all participants together;
             participants, a number; rejected, how many of them sent nothing that could be used, and rejections, how
             many for which reason ({code of `fedpara_edge.errors`, `node_unavailable` or `late`: number});
             train_seconds, mean over participants; gap, and mean_gap of the mean of the factors, which is another where
             they are refitted; factor_norm, weight_norm, ranks (`tasks.measure`), of the first client where each has a
             model of its own; weights_bytes of the new weights, and change_bytes where changes are sent; seconds, of
             the whole round. Of a server also updates, how many counted, and their examples; stragglers, participants
             of whom nothing came; dense_bytes, the size of as many updates of the dense model in float32; and spent,
             the ε so far
    clients  round; clients: {name: {"accuracy", "loss", "examples"}}, each on its own test share
    done     rounds; seconds, of all rounds; diverged, the reason if the arm ended early, else null

The lines of a round are appended together, `round` as the last of them. A process that is killed while it appends
leaves a line without end or lines without their round, which are cut off when the run goes on. When a run is done its
lines are put in the order of the plan, so that they do not depend on which arm was faster.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any, TypeGuard

from fedpara_edge.errors import FedparaError, InputError, brief, brief_text
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.wholefile import JOURNAL_BYTES, read_whole

Event = Mapping[str, Any]
ORDER = ("arm", "clients", "round", "done")
"""Order of the lines about one round: those about its clients come first, as they are cut off without the round."""
MAX_NUMBER = 1 << 53
_OF_ROUNDS = ("clients", "round")
_NUMBERS: Mapping[str, Sequence[str]] = {
    "arm": ("shared_parameters",),
    "round": ("accuracy", "loss", "up_bytes", "down_bytes", "seconds", "weights_bytes", "change_bytes"),
    "done": ("rounds",),
}
"""Fields that are computed with when a run goes on: numbers, or null."""


class Journal:
    """The metrics of a run, to read and to append to from several threads.

    Args:
        path: File `metrics.jsonl`, which need not exist.

    Attributes:
        events: All events, in the order of the lines.

    Raises:
        InputError: The file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._appending = threading.Lock()
        self.events: list[Event] = []
        if path.exists():
            self.events, good_bytes = _read(path)
            os.truncate(path, good_bytes)

    def of(self, arm: str, seed: int, event: str) -> list[Event]:
        """The events of one kind of one arm and seed, in the order in which they came."""
        return [e for e in self.events if (e["arm"], e["seed"], e["event"]) == (arm, seed, event)]

    def last(self, arm: str, seed: int, event: str) -> Event:
        """The last event of one kind of one arm and seed; an empty one if there is none."""
        return next(reversed(self.of(arm, seed, event)), {})

    def append(self, *events: Event) -> None:
        """Append events that belong together, the last of which is no `clients`, and sync them to disk.

        Raises:
            FedparaError: The disk refuses the write; the file is as before.
        """
        plain = [{name: _finite(value) for name, value in event.items()} for event in events]
        text = "".join(json.dumps(event, allow_nan=False) + "\n" for event in plain)
        with self._appending:
            with _all_or_nothing(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            self.events += plain

    def sort(self, arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Put the lines in the order of the plan: by arm, seed and round."""

        def place(event: Event) -> tuple[int, ...]:
            kind = event["event"]
            round: int = {"arm": 0, "done": 1 << 60}.get(kind) or event.get("round", 0)
            return arms.index(event["arm"]), seeds.index(event["seed"]), round, ORDER.index(kind)

        with self._appending:
            self._replace(sorted(self.events, key=place))

    def revise(self, change: Callable[[Event], Event | None]) -> None:
        """Replace every event by another or, for None, by nothing; all at once.

        Raises:
            FedparaError: The disk refuses the write; the file is as before.
        """
        with self._appending:
            revised = [new for event in self.events if (new := change(event)) is not None]
            if revised != self.events:
                self._replace(revised)

    def _replace(self, events: list[Event]) -> None:
        with replacing_file(self._path) as temporary:
            temporary.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        self.events = events


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _all_or_nothing(path: Path) -> Iterator[None]:
    """Cut a file back to its size if what is appended to it fails, so that nothing is put behind half a line."""
    size_bytes = path.stat().st_size if path.exists() else 0
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            os.truncate(path, size_bytes)
        if isinstance(error, OSError):
            raise FedparaError(
                f"{path}: expected to append to it, found {error.strerror or error}; free space, then the same command "
                "goes on from the last round"
            ) from error
        raise


def _read(path: Path) -> tuple[list[Event], int]:
    """The events, and the number of bytes up to the last whole round or other event."""
    events: list[Event] = []
    pending: list[Event] = []
    position = good_bytes = 0
    try:
        content = read_whole(path, max_bytes=JOURNAL_BYTES)
    except OSError as error:
        raise InputError(
            f"{path}: expected the metrics of a run, found {error.strerror}; choose another folder"
        ) from error
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        position += len(line)
        if not line.endswith(b"\n"):
            break
        pending.append(_event(f"{path}: line {number}", line))
        if pending[-1]["event"] != "clients":
            events += pending
            pending, good_bytes = [], position
    return events, good_bytes


def is_number(value: Any) -> TypeGuard[int]:
    """Whether a value can be the number of a seed or a round, which arithmetic can hold."""
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _event(place: str, line: bytes) -> Event:
    try:
        event: Event = json.loads(line)
        kind, numbers = event["event"], [event["seed"]] + ([event["round"]] if event["event"] in _OF_ROUNDS else [])
        if kind not in ORDER or not isinstance(event["arm"], str) or not all(map(is_number, numbers)):
            raise ValueError(f"the event {brief(event)}")
        for name in _NUMBERS.get(kind, ()):
            if type(value := event[name]) not in (int, float, NoneType) or not abs(value or 0) <= MAX_NUMBER:
                raise ValueError(f"{name} {brief(value)}")
        if kind == "done" and not isinstance(event["diverged"], str | None):
            raise ValueError(f"diverged {brief(event['diverged'])}")
        return event
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"no field {error}" if isinstance(error, KeyError) else brief_text(str(error), max_length=200)
        raise InputError(
            f"{place}: expected one metric with its fields, found {found}; restore the file, or take another folder"
        ) from error
