"""Training steps of models with depthwise convolutions and BatchNorm: the engine onnxruntime against torch eager.

MobileNetV2 at two widths and DS-CNN, each with FedPara factors and dense, BatchNorms trained as in torch. All take
steps in turn, in one process, and each figure is a median; only the ratios are meant to carry over to other machines.

    python benchmarks/mobile.py --json mobile.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from architectures.audio import ds_cnn
from device import BATCH, RATE, median_ms
from parts import keep_options, measure_parts, write_rows
from torch import nn
from torch.nn import functional as F

from device_runtime import open_engine
from export import export_bundle
from fedpara_edge.cli.output import table
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import convert, mobilenet_v2

ENGINE = "onnxruntime"
IMAGE = (3, 32, 32)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DS-CNN": (ds_cnn, (1, 40, 20)),
    "MobileNetV2 0.25": (partial(mobilenet_v2, 10, IMAGE, width=0.25, kind="dense"), IMAGE),
    "MobileNetV2 1.0": (partial(mobilenet_v2, 10, IMAGE, kind="dense"), IMAGE),
}
"""Models, with all layers dense, and the shapes of their inputs."""
KINDS = ("fedpara", "dense")


def steppers(model: str, kind: str, threads: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Functions that take one training step of the same model on the same batch, by runtime."""
    make, shape = MODELS[model]
    torch.manual_seed(0)
    module, _ = convert(make(), Factorization(kind=kind, batchnorm="train"))
    path = folder / f"{model}-{kind}".replace(" ", "-")
    if not path.exists():
        config = ExportConfig(name=model, input_shape=shape, input_dtype="float32", engines=(ENGINE,))
        export_bundle(module, path, config)
    generator = np.random.default_rng(0)
    x, y = generator.random((BATCH, *shape), np.float32), generator.integers(0, 10, BATCH)
    x_torch, y_torch = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.SGD(module.train().parameters(), lr=RATE)

    def torch_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(x_torch), y_torch).backward()
        optimizer.step()

    engine = open_engine(open_bundle(path), ENGINE, threads=threads)
    return {
        f"torch {kind}": torch_step,
        f"{ENGINE} {kind}": partial(engine.step, x, y, learning_rate=RATE, seed=0),
    }


def measure(model: str, threads: int, folder: Path, repetitions: int) -> dict[str, Any]:
    """Step times of the factored and the dense model in both runtimes, and their ratios."""
    torch.set_num_threads(threads)
    ms = median_ms(
        {name: step for kind in KINDS for name, step in steppers(model, kind, threads, folder).items()}, repetitions
    )
    ours = ms[f"{ENGINE} fedpara"]
    return {
        "model": model,
        "threads": threads,
        "ms": ms,
        "over_torch": ours / ms["torch fedpara"],
        "over_dense": ours / ms[f"{ENGINE} dense"],
        "over_torch_dense": ours / ms["torch dense"],
        "dense_over_torch": ms[f"{ENGINE} dense"] / ms["torch dense"],
    }


RATIOS = {
    "over_torch": "onnxruntime/torch",
    "over_dense": "FedPara/dense",
    "over_torch_dense": "onnxruntime FedPara/torch dense",
    "dense_over_torch": "dense: onnxruntime/torch",
}


def report(parts: Mapping[str, Any]) -> str:
    """Tables of the results."""
    names = [f"{runtime} {kind}" for kind in KINDS for runtime in (ENGINE, "torch")]
    found = list(parts.values())
    times = [(row["model"], row["threads"], *(f"{row['ms'][name]:.2f}" for name in names)) for row in found]
    ratios = [(row["model"], row["threads"], *(f"{row[name]:.2f}" for name in RATIOS)) for row in found]
    return (
        f"milliseconds a step of {BATCH} (medians)\n\n{table(('model', 'threads', *names), times)}\n\n"
        f"ratios\n\n{table(('model', 'threads', *RATIOS.values()), ratios)}"
    )


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--repetitions", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(models: str, threads: str, repetitions: int, json_file: Path | None, kept: Path | None, again: bool) -> None:
    """Measure, print the tables, and write them as JSON."""
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Callable[[], Any]] = {
            f"{model}, {count} threads": partial(measure, model, count, Path(name), repetitions)
            for model in models.split(",")
            for count in map(int, threads.split(","))
        }
        settings = {"batch": BATCH, "repetitions": repetitions}
        measured = measure_parts(parts, report, settings=settings, kept=kept, again=again)
    click.echo(report(measured))
    write_rows(json_file, measured.values())


if __name__ == "__main__":
    main()
