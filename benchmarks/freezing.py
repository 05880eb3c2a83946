"""Cost of a training with frozen layers (`export --freeze`) over that with everything trained, in both engines.

The same dense model, once whole and once with all but its last layers frozen: bytes of an update, time of a step, and
peak memory of a whole process that takes one step. Both take steps in turn, in one process; only the ratios are meant
to carry over to other machines.

    python benchmarks/freezing.py --json freezing.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
from device import BATCH, RATE, measure_process, median_ms, random_batch
from parts import keep_options, measure_parts, write_rows

from device_runtime import open_engine
from export import make_bundle
from fedpara_edge.cli.output import table
from fedpara_edge.formats.bundle import ENGINES, Bundle
from fedpara_edge.formats.recipe import Recipe

FROZEN = {"mlp": ("hidden",), "cnn": ("conv*", "norm*"), "resnet18": ("conv*", "norm*", "block*")}
"""Layers to freeze, by model: all but the head."""
ARMS = ("whole", "frozen")


def bundle(model: str, arm: str, folder: Path) -> Bundle:
    """Bundle of a dense model of the zoo for both engines."""
    freeze = FROZEN[model] if arm == "frozen" else ()
    return make_bundle(Recipe(name=model, kind="dense", freeze=freeze), folder / f"{model}-{arm}").bundle


def measure(model: str, threads: int, folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Ratios of the frozen model's costs to the whole one's, by engine."""
    bundles = {arm: bundle(model, arm, folder) for arm in ARMS}
    sent = [bundles[arm].manifest.layout.shared_parameters for arm in ARMS]
    x, y = random_batch(model)
    rows = []
    for name in ENGINES:
        engines = {arm: open_engine(bundles[arm], name, threads=threads) for arm in ARMS}
        steps = {arm: partial(engine.step, x, y, learning_rate=RATE, seed=0) for arm, engine in engines.items()}
        ms = median_ms(dict(steps), repetitions)
        peak = {arm: measure_process(model, bundles[arm].path, name, repetitions)["peak_mb"] for arm in ARMS}
        rows.append(
            {
                "model": model,
                "engine": name,
                "ms": ms,
                "peak_mb": peak,
                "update": sent[1] / sent[0],
                "time": ms["frozen"] / ms["whole"],
                "memory": peak["frozen"] / peak["whole"],
            }
        )
    return rows


def report(parts: Mapping[str, Any]) -> str:
    """Table of the results."""
    rows = [
        (
            row["model"],
            row["engine"],
            *(f"{row[what][arm]:.{digits}f}" for what, digits in (("ms", 2), ("peak_mb", 0)) for arm in ARMS),
            *(f"{row[what]:.3f}" for what in ("update", "time", "memory")),
        )
        for found in parts.values()
        for row in found
    ]
    header = ("model", "engine", "ms whole", "ms frozen", "MB whole", "MB frozen", "update", "time", "memory")
    return f"all but the head frozen, over nothing frozen; steps of {BATCH}\n\n{table(header, rows)}"


@click.command()
@click.option("--models", default=",".join(FROZEN), show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--repetitions", default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(models: str, threads: int, repetitions: int, json_file: Path | None, kept: Path | None, again: bool) -> None:
    """Measure, print the table, and write it as JSON."""
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Callable[[], Any]] = {
            model: partial(measure, model, threads, Path(name), repetitions) for model in models.split(",")
        }
        settings = {"batch": BATCH, "threads": threads, "repetitions": repetitions}
        measured = measure_parts(parts, report, settings=settings, kept=kept, again=again)
    click.echo(report(measured))
    write_rows(json_file, chain.from_iterable(measured.values()))


if __name__ == "__main__":
    main()
