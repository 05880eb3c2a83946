"""Time of inference: the folded FedPara model against the dense model of the same architecture, folded the same way.

The folded model is also compared with the factored graph that evaluates a bundle, which composes its weights anew for
every batch, and the other precisions with float32. All contenders predict in turn, in one process, and each figure is a
median; only the ratios are meant to carry over to other machines.

    python benchmarks/folded.py --json folded.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch
from parts import keep_options, measure_parts

from device_runtime import open_engine
from device_runtime.prediction import Predictor
from export import export_bundle
from export.folding.fold import fold
from fedpara_edge.cli.output import table
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.folded import Precision
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.nn import ZOO

BATCHES, CALLS_A_TURN, PAUSE_SECONDS = (1, 32), 5, 0.05
DENSE, FACTORED = "dense", "factored"


def folded(bundle: Bundle, precision: Precision, threads: int) -> Predictor:
    """Predictor of a bundle's initial weights, folded."""
    path = bundle.path / f"{precision}.onnx"
    fold(bundle, read_weights(bundle.file(WEIGHTS)), path, precision=precision)
    return Predictor(path, threads=threads)


def contenders(model: str, threads: int, folder: Path) -> dict[str, Callable[[Any], object]]:
    """Functions that predict a batch of raw inputs, by name."""
    bundles = {}
    for kind in ("fedpara", "dense"):
        torch.manual_seed(0)
        entry = ZOO[model]
        options = ExportConfig(
            name=model, input_shape=entry.input_shape, input_dtype=entry.input_dtype, engines=("onnxruntime",)
        )
        bundles[kind], _ = export_bundle(entry.factory(kind=kind), folder / f"{model}-{kind}", options)
    engine = open_engine(bundles["fedpara"], "onnxruntime", threads=threads)
    precisions: Sequence[Precision] = get_args(Precision)
    return {
        **{precision: folded(bundles["fedpara"], precision, threads).predict for precision in precisions},
        DENSE: folded(bundles["dense"], "float32", threads).predict,
        FACTORED: lambda x: engine.evaluate(x, np.zeros(len(x), np.int64)),
    }


def median_ms(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each call; a turn begins with a pause (threads spin on for a while) and a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            time.sleep(PAUSE_SECONDS)
            call()
            for _ in range(CALLS_A_TURN):
                started = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(model: str, threads: int, folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Times and ratios for each batch size."""
    predict = contenders(model, threads, folder)
    generator = np.random.default_rng(0)
    rows = []
    for batch in BATCHES:
        x = generator.integers(0, 256, (batch, *ZOO[model].input_shape)).astype(np.uint8)
        ms = median_ms({name: lambda run=run, x=x: run(x) for name, run in predict.items()}, repetitions)
        ratios = {name: ms["float32"] / ms[name] for name in (DENSE, FACTORED)}
        rows.append({"model": model, "threads": threads, "batch": batch, "ms": ms, "ratios": ratios})
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Table of the results."""
    columns = ("float32", DENSE, FACTORED, "float16", "int8")
    cells = [
        (
            row["model"],
            row["batch"],
            *(f"{row['ms'][name]:.2f}" for name in columns),
            *(f"{row['ratios'][name]:.2f}" for name in (DENSE, FACTORED)),
        )
        for row in rows
    ]
    header = ("model", "batch", "folded", *columns[1:], "folded/dense", "folded/factored")
    return f"milliseconds a batch at {rows[0]['threads']} threads (medians) and ratios\n\n{table(header, cells)}"


@click.command()
@click.option("--models", default="mlp,cnn,resnet18", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--repetitions", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(models: str, threads: int, repetitions: int, json_file: Path | None, kept: Path | None, again: bool) -> None:
    """Measure, print the table, and write it as JSON."""
    with tempfile.TemporaryDirectory() as name:
        measured = measure_parts(
            {model: partial(measure, model, threads, Path(name), repetitions) for model in models.split(",")},
            lambda parts: report([*chain.from_iterable(parts.values())]),
            settings={"threads": threads, "repetitions": repetitions},
            kept=kept,
            again=again,
        )
    rows = [*chain.from_iterable(measured.values())]
    click.echo(report(rows))
    if json_file is not None:
        json_file.write_text(json.dumps({"inference": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
