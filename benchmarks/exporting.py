"""Time and memory of `fedpara-edge export`, beside those of `torch.onnx.export` alone on the same model.

Each is a whole process, from the start of Python to its end, so that imports count as they do for a user; they run in
turn. The export writes and verifies the files of both engines, and the larger of its two processes counts.

    python benchmarks/exporting.py --json exporting.json
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
from parts import keep_options, measure_parts, write_rows

from fedpara_edge.cli.output import table

SHAPES = {
    "cnn": "1,28,28",
    "mobilenetv2-0.25": "3,96,96",
    "mobilenetv3-small": "3,96,96",
    "mobilenetv2": "3,96,96",
    "resnet18": "3,32,32",
}
"""Shapes of an input, by model."""
ARMS = ("export", "torch")
BARE = """\
import sys, torch
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.nn import ZOO, convert
from fedpara_edge.nn.load import load_model
name, shape = sys.argv[1], tuple(map(int, sys.argv[2].split(",")))
choice = Factorization(exclude=ZOO[name].dense_layers, batchnorm=ZOO[name].batchnorm)
model, _ = convert(load_model(name, input_shape=shape), choice)
sizes = ({0: torch.export.Dim("batch")},)
torch.onnx.export(model.eval(), (torch.zeros(4, *shape),), dynamo=True, optimize=False, dynamic_shapes=sizes)
"""


def measure_command(command: Sequence[str]) -> tuple[float, float]:
    """Seconds, and peak memory in MB, of a command.

    Raises:
        SystemExit: It failed.
    """
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])}: ended with exit code {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def measure(model: str, folder: Path, repetitions: int) -> dict[str, Any]:
    """Medians of a model."""
    export = ["export", model, "--input-shape", SHAPES[model], "--overwrite", "-o", str(folder / model)]
    commands = {
        "export": [sys.executable, "-m", "fedpara_edge", *export],
        "torch": [sys.executable, "-c", BARE, model, SHAPES[model]],
    }
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for _ in range(repetitions):
        for arm in ARMS:
            found[arm].append(measure_command(commands[arm]))
    seconds, peak = ({arm: median(each[index] for each in found[arm]) for arm in ARMS} for index in (0, 1))
    return {"model": model, "seconds": seconds, "peak_mb": peak, "ratio": seconds["export"] / seconds["torch"]}


def report(parts: Mapping[str, Any]) -> str:
    """Table of the results."""
    rows = [
        (
            row["model"],
            *(f"{row['seconds'][arm]:.1f}" for arm in ARMS),
            f"{row['ratio']:.2f}",
            *(f"{row['peak_mb'][arm]:.0f}" for arm in ARMS),
        )
        for row in parts.values()
    ]
    header = ("model", "s export", "s torch.onnx", "export / torch.onnx", "MB export", "MB torch.onnx")
    return f"whole processes; export writes and verifies both engines' files\n\n{table(header, rows)}"


@click.command()
@click.option("--models", default=",".join(SHAPES), show_default=True)
@click.option("--repetitions", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(models: str, repetitions: int, json_file: Path | None, kept: Path | None, again: bool) -> None:
    """Measure, print the table, and write it as JSON."""
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Callable[[], Any]] = {
            model: partial(measure, model, Path(name), repetitions) for model in models.split(",")
        }
        measured = measure_parts(parts, report, settings={"repetitions": repetitions}, kept=kept, again=again)
    click.echo(report(measured))
    write_rows(json_file, measured.values())


if __name__ == "__main__":
    main()
