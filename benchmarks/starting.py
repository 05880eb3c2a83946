"""Starts of the command line against the import that each can't do without, in turn, and the modules that take longest.

    python benchmarks/starting.py --json starting.json

    help        `fedpara-edge --help`, over `import numpy`, which it does not need
    aggregate   a round of one small update, over `import numpy`
    train       one step of a small model, over `import onnxruntime` without torch, as plain onnxruntime comes

Each start is a process of its own, with the bytecode of all modules in the cache, as after the first one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from parts import keep_options, measure_parts

from export import export_bundle
from fedpara_edge.cli.output import table
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import ZOO

COMMAND = ("-m", "fedpara_edge")
NUMPY = ("-c", "import numpy")
ONNXRUNTIME = ("-c", "import sys; sys.modules['onnxruntime.training'] = None; import onnxruntime")
AGGREGATE = ("aggregate", "update", "--weights", "bundle/weights.safetensors", "-o", "next", "--overwrite")
TRAIN = ("train", "bundle", "--data", "data.npz", "--client", "a", "-o", "update", "--overwrite")
STARTS = {
    "help": ((*COMMAND, "--help"), NUMPY),
    "aggregate": ((*COMMAND, *AGGREGATE), NUMPY),
    "train": ((*COMMAND, *TRAIN), ONNXRUNTIME),
}
"""What starts, and the import that it is compared with."""
LONGEST = 5


def prepare(folder: Path) -> None:
    """A bundle of the zoo's mlp with a batch of data for it, and an update."""
    torch.manual_seed(0)
    entry = ZOO["mlp"]
    options = ExportConfig(
        name="mlp", input_shape=entry.input_shape, input_dtype=entry.input_dtype, engines=("onnxruntime",)
    )
    export_bundle(entry.factory(kind="fedpara"), folder / "bundle", options)
    x = np.random.default_rng(0).integers(0, 256, (32, *entry.input_shape), np.uint8)
    np.savez(folder / "data.npz", x=x, y=np.arange(32) % 10)
    start((*COMMAND, *TRAIN), folder)


def start(arguments: Sequence[str], folder: Path, *options: str) -> str:
    """Run Python once in a folder; what it wrote to stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *options, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return done.stderr


def measure(name: str, folder: Path, repetitions: int) -> dict[str, Any]:
    """Median seconds of a start and of its import, in turn, and milliseconds of the modules that take longest."""
    if not (folder / "bundle").exists():
        prepare(folder)
    kinds = dict(zip(("start", "import"), STARTS[name], strict=True))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(repetitions + 1):
        for kind, arguments in kinds.items():
            started = time.perf_counter()
            start(arguments, folder)
            if number:
                seconds[kind].append(time.perf_counter() - started)
    found = {kind: median(times) for kind, times in seconds.items()}
    return {"seconds": found, "ratio": found["start"] / found["import"], "longest_ms": _longest(name, folder)}


def _longest(name: str, folder: Path) -> dict[str, float]:
    """Milliseconds that packages take to import, without those of the import that the start is compared with."""
    found, base = (_imports(arguments, folder) for arguments in STARTS[name])
    sums: dict[str, float] = {}
    for module, ms in found.items():
        if module not in base:
            package = ".".join(module.split(".")[:2]) if module.startswith("fedpara_edge") else module.split(".")[0]
            sums[package] = sums.get(package, 0) + ms
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:LONGEST])


def _imports(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    lines = [line.split("|") for line in start(arguments, folder, "-X", "importtime").splitlines()]
    timed = [line for line in lines if len(line) == 3 and line[0].removeprefix("import time:").strip().isdigit()]
    return {module.strip(): int(own.removeprefix("import time:")) / 1000 for own, _, module in timed}


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Table of the results."""
    rows = [
        (
            name,
            f"{result['seconds']['start']:.3f}",
            STARTS[name][1][1].rpartition("import ")[2],
            f"{result['seconds']['import']:.3f}",
            f"{result['ratio']:.2f}",
            ", ".join(f"{module} {ms:.0f}" for module, ms in result["longest_ms"].items()),
        )
        for name, result in results.items()
    ]
    return table(("start", "seconds", "import", "seconds", "ratio", "ms of imports besides"), rows)


@click.command(help=__doc__)
@click.option("--repetitions", default=21, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="File for the numbers.")
@keep_options
def main(repetitions: int, output: Path | None, kept: Path | None, again: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="starting-") as name:
        measured = measure_parts(
            {start: partial(measure, start, Path(name), repetitions) for start in STARTS},
            report,
            settings={"repetitions": repetitions},
            kept=kept,
            again=again,
        )
    click.echo(report(measured))
    if output is not None:
        output.write_text(json.dumps({"starts": measured}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
