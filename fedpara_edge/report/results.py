"""Measurements of a run, from `metrics.jsonl` and `plan.toml`, which the run of a server does not have.

The run may be unfinished: the last line may be torn, fields may be missing or null, and seeds may have reached
different rounds. What is there is read; of two lines about the same round the later one counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedpara_edge.errors import InputError
from fedpara_edge.simulation.folder import METRICS, RunFolder
from fedpara_edge.simulation.metrics import is_number
from fedpara_edge.simulation.plan.plan import Arm, Plan, read_plan
from fedpara_edge.storage.wholefile import JOURNAL_BYTES, read_whole

Line = Mapping[str, Any]
_SCORES = ("accuracy", "loss")


@dataclass(frozen=True)
class SeedRun:
    """Measurements of one arm with one seed.

    Attributes:
        seed: Seed of the arm's run.
        about: Line about the arm: model, parameters, clients and so on; empty if there is none.
        rounds: Lines about the rounds, by number.
        clients: Last measurement on each client's own test share, by name of the client.
        done: Line about the end; None if the arm is not done.
    """

    seed: int
    about: Line
    rounds: Mapping[int, Line]
    clients: Mapping[str, Line]
    done: Line | None

    def series(self, field: str) -> dict[int, float]:
        """Finite values of a field by round, ascending."""
        found = ((number, number_of(line, field)) for number, line in sorted(self.rounds.items()))
        return {number: value for number, value in found if value is not None}

    def total_bytes(self) -> dict[int, int]:
        """Bytes sent up and down from the first round on, by round, up to the first round that lacks them."""
        sums: dict[int, int] = {}
        total, number = 0, 1
        while (line := self.rounds.get(number)) is not None and (sent := round_bytes(line)) is not None:
            sums[number] = total = total + sent
            number += 1
        return sums


@dataclass(frozen=True)
class ArmRun:
    """Measurements of one arm, by seed in ascending order."""

    name: str
    seeds: tuple[SeedRun, ...]

    @property
    def about(self) -> Line:
        """Line about the arm, from its first seed."""
        return self.seeds[0].about


@dataclass(frozen=True, kw_only=True)
class Unplanned:
    """What stands in for the plan of a run that has none.

    Attributes:
        name: Name of the run.
        rounds: Rounds after which it ends, or that it has so far if it has no end.
        seeds: Seeds of the run.
        evaluated: Rounds whose weights were evaluated.
    """

    name: str
    rounds: int
    seeds: tuple[int, ...]
    evaluated: frozenset[int]
    arms: ClassVar[tuple[Arm, ...]] = ()
    reference: ClassVar[str | None] = None
    target: ClassVar[float | None] = None
    evaluated_on: ClassVar[Literal["common"]] = "common"

    def is_evaluated(self, number: int, *, last: int) -> bool:  # noqa: ARG002
        """Whether weights after a round were evaluated."""
        return number in self.evaluated


@dataclass(frozen=True)
class Results:
    """Measurements of a run.

    Attributes:
        plan: Plan of the run, or what stands in for it.
        arms: Arms that have begun, in the order of the plan.
    """

    plan: Plan | Unplanned
    arms: tuple[ArmRun, ...]


def read_results(run: Path) -> Results:
    """Read a run folder.

    Raises:
        InputError: The metrics are missing, they or the plan are damaged, or no arm has begun.
    """
    folder = RunFolder(run)
    if not folder.plan.is_file() and not folder.metrics.is_file():
        raise InputError(f"{run}: expected a run folder with {METRICS}, found none; check the path")
    if not folder.plan.is_file():
        arms = read_arms(folder.metrics)
        return Results(_unplanned(arms), arms)
    plan = read_plan(folder.plan)
    places = {arm.name: place for place, arm in enumerate(plan.arms)}
    planned = sorted(read_arms(folder.metrics), key=lambda arm: places.get(arm.name, len(places)))
    return Results(plan, tuple(planned))


def read_arms(path: Path) -> tuple[ArmRun, ...]:
    """Read metrics, those of a run that has no plan too.

    Returns:
        Arms in the order in which they began.

    Raises:
        InputError: The file is missing or damaged, or no arm has begun.
    """
    found: dict[str, dict[int, list[Line]]] = {}
    for line in _lines(path):
        arm, seed = line.get("arm"), line.get("seed")
        if isinstance(arm, str) and is_number(seed):
            found.setdefault(arm, {}).setdefault(seed, []).append(line)
    if not found:
        raise InputError(f"{path}: expected lines about arms, found none; let the simulation run first")
    return tuple(ArmRun(name, tuple(starmap(_seed_run, sorted(seeds.items())))) for name, seeds in found.items())


def _unplanned(arms: Sequence[ArmRun]) -> Unplanned:
    lines = [(number, line) for arm in arms for seed in arm.seeds for number, line in seed.rounds.items()]
    ends = [number_of(arm.about, "rounds") for arm in arms]
    return Unplanned(
        name=str(arms[0].about.get("model", arms[0].name)),
        rounds=int(max(end or 0 for end in ends)) or max((number for number, _ in lines), default=0),
        seeds=tuple(sorted({seed.seed for arm in arms for seed in arm.seeds})),
        evaluated=frozenset(n for n, line in lines if any(number_of(line, of) is not None for of in _SCORES)),
    )


def number_of(line: Line, field: str) -> float | None:
    """Value of a field as a finite number; None where it is missing, null or not a number.

    >>> number_of({"accuracy": 0.5, "gap": None, "ok": True}, "accuracy")
    0.5
    """
    value = line.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def numbers_of(line: Line, field: str) -> dict[str, float]:
    """Finite values of a nested field by name; empty where it is missing, null or not nested."""
    values = line.get(field)
    names = values if isinstance(values, dict) else {}
    return {name: value for name in names if (value := number_of(names, name)) is not None}


def round_bytes(line: Line) -> int | None:
    """Bytes that all participants of a round sent, up and down; None if one of them was not measured."""
    up, down = number_of(line, "up_bytes"), number_of(line, "down_bytes")
    return None if up is None or down is None else int(up + down)


def _seed_run(seed: int, lines: Iterable[Line]) -> SeedRun:
    about: Line = {}
    rounds: dict[int, Line] = {}
    clients: dict[int, dict[str, Line]] = {}
    done: Line | None = None
    for line in lines:
        number, of = line.get("round"), line.get("clients")
        match line.get("event"):
            case "arm":
                about = line
            case "round" if is_number(number):
                rounds[number] = line
                done = None  # a run that was over has been given more rounds
            case "clients" if is_number(number) and isinstance(of, dict):
                clients[number] = {name: each for name, each in of.items() if isinstance(each, dict)}
            case "done":
                done = line
    # An interrupted round may have left a line about its clients.
    last = max(clients.keys() & rounds.keys(), default=None)
    return SeedRun(seed, about, rounds, {} if last is None else clients[last], done)


def _lines(path: Path) -> Iterator[Line]:
    try:
        lines = read_whole(path, max_bytes=JOURNAL_BYTES).split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: expected the metrics of a run, found {error.strerror}; check the folder") from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return  # the run was killed while it wrote this line
            raise InputError(
                f"{path}: line {number}: expected a JSON object, found damaged text ({error}); restore the file or "
                "run the plan into a new folder"
            ) from error
        if isinstance(line, dict):
            yield line
