"""The fastest way to take the training steps of a bundle on a device, which is measured there once (`open_tuned`).

A way is a form of the training step, of which a bundle may have two (`export --tunable`), and a number of threads: all
ways give the same result to rounding. The state folder keeps what was found in `tuning.json`, UTF-8 JSON:

    format         "fedpara-edge/tuning"
    version        1
    of             what the choice depends on; another bundle, batch size or release of onnxruntime is measured anew
    chosen         {"form", "threads"}, with null for the runtime's own number of threads
    milliseconds   [{"form", "threads", "ms"}] of a step, of all ways
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_runtime.config import TrainCall
from device_runtime.data import Batch, Dataset
from device_runtime.engines.protocol import Engine, Formed
from device_runtime.engines.registry import open_engine
from device_runtime.state import open_state
from fedpara_edge.errors import InputError, counted
from fedpara_edge.formats.bundle import FORMS, Bundle
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

FILE = "tuning.json"
FORMAT = "fedpara-edge/tuning"
TURNS = 3
"""Turns in which the ways that are left are measured; the first takes one step each, and the others more."""
CLOSE = 1.25
"""Largest quotient of a way's time and the shortest one with which it stays for the next turn."""
GAIN = 0.95
"""Largest quotient of a way's time and that of the ordinary way with which it is chosen in its place."""
TURN_SECONDS, LONGEST_SECONDS = 0.5, 20.0


@dataclass(frozen=True)
class Way:
    """A way to take training steps.

    Args:
        form: Form of the training step.
        threads: Threads of the engine; None for the runtime's own number.
    """

    form: str
    threads: int | None


@dataclass(frozen=True)
class Choice:
    """The way that was chosen.

    Args:
        way: The way.
        milliseconds: Shortest time of a step, by way, the ordinary one first.
    """

    way: Way
    milliseconds: Mapping[Way, float]

    def __str__(self) -> str:
        threads = "one thread per core" if self.way.threads is None else counted(self.way.threads, "thread")
        usual = self.milliseconds[next(iter(self.milliseconds))]
        return (
            f"tuned: {threads}, {self.way.form} form: {self.milliseconds[self.way]:.3g} ms a step, {usual:.3g} without"
        )

    @property
    def log_fields(self) -> dict[str, Any]:
        """Fields of the log event `tuned`."""
        return {**asdict(self.way), "milliseconds": self.milliseconds[self.way]}


def open_tuned(
    bundle: Bundle,
    call: TrainCall,
    dataset: Dataset,
    state: Path | None,
    *,
    seconds: float = TURN_SECONDS,
    on_choice: Callable[[Choice], None] | None = None,
) -> Engine:
    """Open a bundle in the engine of a call; if it asks for tuning, in the way that is the fastest on this device.

    Args:
        bundle: Verified bundle.
        call: Call to train with.
        dataset: Local examples, opened for that bundle.
        state: State folder of the device, which keeps the choice; needed for tuning.
        seconds: Time of the steps of a way in a turn, after which no further one begins.
        on_choice: Function that is called with a choice that was measured now.

    Raises:
        InputError: There is to be tuning without a state folder, or the engine can't be opened.
        BusyError: Another process uses the state folder.
        WrongBundleError: The engine refuses the files, or the state folder is that of another bundle.
    """
    if not call.tune:
        return open_engine(bundle, call.engine, threads=call.threads)
    if state is None:
        raise InputError("expected a folder to keep the choice in, found none; pass --state", key="tune")
    engine = open_engine(bundle, call.engine, threads=call.threads)
    ways = _ways(engine, call.threads)
    if len(ways) == 1:
        return engine
    of = _facts(engine, call, dataset)
    del engine  # its weights would be in memory beside those of the engines that are measured
    with open_state(state, bundle.manifest.fingerprint) as kept:
        kept.committed()
        kept.progress()
        path = kept.folder / FILE
        if path.is_dir():
            raise InputError(f"{path}: expected a file or nothing, found a folder; delete it")
        way = read_choice(path, of, ways)
        if way is None:
            batch = dataset.rows(np.arange(min(call.batch_size, dataset.examples)))
            choice = choose(ways, lambda way, most: _shortest(bundle, call, way, batch, most), seconds=seconds)
            way = choice.way
            write_choice(path, of, choice)
            if on_choice is not None:
                on_choice(choice)
    return _open(bundle, call, way)


def choose(
    ways: Sequence[Way],
    measure: Callable[[Way, float], float],
    *,
    seconds: float = TURN_SECONDS,
    longest: float = LONGEST_SECONDS,
) -> Choice:
    """Choose among ways, of which the first is the ordinary one.

    Args:
        ways: The ways.
        measure: Function that returns the shortest time of a step in ms, of as many as fit some seconds.
        seconds: These seconds, in all turns but the first.
        longest: Seconds after which no further turn begins.
    """
    found, begun = dict.fromkeys(ways, float("inf")), time.monotonic()
    for turn in range(TURNS):
        if turn and time.monotonic() - begun > longest:
            break
        limit = CLOSE * min(found.values())
        for way in ways:
            if found[way] <= limit or way == ways[0]:
                found[way] = min(found[way], measure(way, seconds if turn else 0.0))
    best = min(ways, key=found.__getitem__)
    return Choice(best if found[best] <= GAIN * found[ways[0]] else ways[0], found)


def _ways(engine: Engine, threads: int | None) -> list[Way]:
    """Ways of an engine: with as many threads as are asked for, or with the powers of two below the number of cores."""
    forms = engine.forms if isinstance(engine, Formed) else (next(iter(FORMS)),)
    counts: list[int | None] = [threads]
    if threads is None:
        counts += [count for count in (1, 2, 4, 8, 16, 32) if count < _cores()]
    return [Way(form, count) for form in forms for count in counts]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(bundle: Bundle, call: TrainCall, way: Way) -> Engine:
    engine = open_engine(bundle, call.engine, threads=way.threads)
    if isinstance(engine, Formed):
        engine.form = way.form
    return engine


def _shortest(bundle: Bundle, call: TrainCall, way: Way, batch: Batch, seconds: float) -> float:
    """Shortest time in ms of a step, after a first one, of at least one and as many as fit."""
    engine = _open(bundle, call, way)
    x, y = batch
    times: list[float] = []
    for step in range(1 << 20):
        begun = time.perf_counter()
        engine.step(x, y, learning_rate=0.0, seed=step, micro_batches=call.micro_batches)
        times.append(time.perf_counter() - begun)
        if step and sum(times[1:]) >= seconds:
            break
    return 1000 * min(times[1:])


def _facts(engine: Engine, call: TrainCall, dataset: Dataset) -> dict[str, Any]:
    """What a choice depends on, as plain JSON data."""
    from device_runtime.engines.ort import __version__

    files = engine.bundle.manifest.files
    return {
        "engine": engine.name,
        "onnxruntime": __version__,
        "graphs": [files[file]["sha256"] for file in sorted(files) if file.endswith(".onnx")],
        "rows": min(call.batch_size, dataset.examples),
        "micro_batches": call.micro_batches,
        "threads": call.threads,
        "cores": _cores(),
    }


def read_choice(path: Path, of: Mapping[str, Any], ways: Sequence[Way]) -> Way | None:
    """The way that a file has for some facts; None for others, or where there is no such file."""
    try:
        found = strict_json(read_text(path))
        head = {"format": FORMAT, "version": 1, "of": dict(of)}
        if {key: found[key] for key in head} != head:
            return None
        return next((way for way in ways if asdict(way) == found["chosen"]), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_choice(path: Path, of: Mapping[str, Any], choice: Choice) -> None:
    """Write a choice and the facts that it was made for, atomically.

    Raises:
        FedparaError: The disk refuses the write.
    """
    content = {
        "format": FORMAT,
        "version": 1,
        "of": dict(of),
        "chosen": asdict(choice.way),
        "milliseconds": [{**asdict(way), "ms": round(ms, 3)} for way, ms in choice.milliseconds.items()],
    }
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
