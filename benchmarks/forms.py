"""Forms of a training step, and what a device that measures them chooses (`train --tune`).

The same bundle, exported with `--tunable`, takes steps in both of its forms, in turn, in one process. The ratio of a
turn is that of its median times, and the table has the median and the range of all turns: a form depends on the number
of threads only where the ranges of its ratios lie on different sides of 1. Then a device chooses for itself, among
forms and numbers of threads, as the command line does.

    python benchmarks/forms.py --models cnn --json forms.json
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
from device import BATCH, RATE, median_ms, random_batch
from earlier import MODELS
from parts import keep_options, measure_parts, write_rows

from device_runtime import Choice, open_data, open_engine, open_tuned
from device_runtime.config import TrainCall
from device_runtime.engines.portable import Portable
from export.build import make_bundle
from fedpara_edge.cli.output import table
from fedpara_edge.formats.bundle import FORMS, Bundle
from fedpara_edge.formats.recipe import Recipe

ENGINE = "onnxruntime"


def measure(model: str, folder: Path, threads: tuple[int, ...], repetitions: int) -> list[dict[str, Any]]:
    """Times of both forms of a model's step at some numbers of threads, and the way that a device chooses."""
    bundle = make_bundle(Recipe(name=model, engines=(ENGINE,), tunable=True), folder / model).bundle
    x, y = random_batch(model)
    rows = []
    for count in threads:
        steps = {form: _stepper(bundle, form, count, x, y) for form in FORMS}
        found = [median_ms(steps, 1) for _ in range(repetitions)]
        rows.append({"model": model, "threads": count, "turns": found})
    path = folder / f"{model}.npz"
    np.savez(path, x=x, y=y)
    choices: list[Choice] = []
    call = TrainCall(engine=ENGINE, batch_size=BATCH, tune=True)
    began = time.perf_counter()
    open_tuned(bundle, call, open_data(path, bundle.manifest), folder / f"{model}-state", on_choice=choices.append)
    seconds = time.perf_counter() - began
    ((chosen, milliseconds),) = ((choice.way, choice.milliseconds) for choice in choices)
    usual = next(iter(milliseconds))
    rows.append(
        {
            "model": model,
            "form": chosen.form,
            "threads": chosen.threads or "one per core",
            "usual": milliseconds[usual],
            "chosen": milliseconds[chosen],
            "seconds": seconds,
        }
    )
    return rows


def _stepper(bundle: Bundle, form: str, threads: int, x: Any, y: Any) -> Callable[[], object]:
    engine = open_engine(bundle, ENGINE, threads=threads)
    assert isinstance(engine, Portable)
    engine.form = form
    return partial(engine.step, x, y, learning_rate=RATE, seed=0)


def report(parts: Mapping[str, Any]) -> str:
    """Tables of the results."""
    rows = [*chain.from_iterable(parts.values())]
    forms = []
    for row in (row for row in rows if "turns" in row):
        ms = {form: statistics.median(turn[form] for turn in row["turns"]) for form in FORMS}
        ratios = sorted(turn["direct"] / turn["default"] for turn in row["turns"])
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        forms.append((row["model"], row["threads"], *(f"{ms[form]:.1f}" for form in FORMS), ratio))
    chosen = [
        (row["model"], row["form"], row["threads"], *(f"{row[name]:.1f}" for name in ("usual", "chosen", "seconds")))
        for row in rows
        if "turns" not in row
    ]
    return "\n\n".join(
        [
            f"milliseconds of a step of {BATCH} (medians), and the quotient of both forms (median and range of turns)",
            table(("model", "threads", *FORMS, "direct/default"), forms),
            "what a device chooses: milliseconds of its usual step and of the chosen one, and the seconds that it took",
            table(("model", "form", "threads", "usual", "chosen", "seconds"), chosen),
        ]
    )


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--repetitions", default=9, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(models: str, threads: str, repetitions: int, json_file: Path | None, kept: Path | None, again: bool) -> None:
    """Measure, print the tables, and write them as JSON."""
    counts = tuple(map(int, threads.split(",")))
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Callable[[], Any]] = {
            model: partial(measure, model, Path(name), counts, repetitions) for model in models.split(",")
        }
        settings = {"batch": BATCH, "threads": counts, "repetitions": repetitions}
        measured = measure_parts(parts, report, settings=settings, kept=kept, again=again)
    click.echo(report(measured))
    write_rows(json_file, chain.from_iterable(measured.values()))


if __name__ == "__main__":
    main()
