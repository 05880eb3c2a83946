"""Training steps of an earlier exporter beside today's: time, time outside convolutions, and nodes.

The same model, with the same weights, is exported by the code of an earlier commit, which is taken from the history of
this checkout, and by today's. Both graphs take steps in turn, in one process, on the same runtime; the times by
operator are those of its profile, also in turn. Only the ratios are meant to carry over to other machines.

Today's graphs compute some convolutions as matrix products (Winograd's filtering), which the earlier ones didn't. So
there are two sums besides the whole step. `outside Conv` leaves out Conv and ConvTranspose alone, and so counts these
products against today's graph. `outside products` leaves out all matrix products too, in both graphs.

    python benchmarks/earlier.py --models cnn --json earlier.json
"""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
from device import BATCH, RATE, median_ms, random_batch
from limits import operators
from parts import keep_options, measure_parts, write_rows

from device_runtime import open_engine
from fedpara_edge.cli.output import table
from fedpara_edge.formats.bundle import Bundle, open_bundle

BEFORE = "b976b50f1c6f534803e321002f94a5b65b96cece"
"""Last commit before Winograd's filtering and steps with fewer passes, the first changes to a graph for its speed; its
zoo has all models of today's."""
TODAY, EARLIER = "today", "earlier"
ROOT = Path(__file__).parents[1]
MODELS = ("cnn", "resnet18", "vgg16", "mobilenetv2-0.25")
ENGINE = "onnxruntime"
CONVOLUTIONS = ("Conv", "ConvTranspose", "FusedConv")
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")
SUMS: dict[str, tuple[str, ...]] = {"outside Conv": CONVOLUTIONS, "outside products": (*CONVOLUTIONS, *PRODUCTS)}
"""Operators that each sum of times leaves out."""
AGREEMENT = 1e-4
"""Largest relative difference of the first loss, as sums in float32 are taken in other orders."""


def code_of(commit: str, folder: Path) -> Path:
    """Folder with the library and the exporter as of a commit."""
    command = ["git", "-C", str(ROOT), "archive", commit, "fedpara_edge", "device_runtime", "export"]
    try:
        content = subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(
            f"{ROOT}: expected a git checkout with commit {commit[:7]} in its history, found none; clone the "
            "repository with its whole history"
        ) from error
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def export(model: str, code: Path, folder: Path) -> Bundle:
    """Bundle of a zoo model, exported by some code in a process of its own."""
    command = [sys.executable, "-m", "fedpara_edge", "export", model, "--engines", ENGINE, "-o", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{model}, exported by {code}: {done.stderr.strip()}")
    return open_bundle(folder)


def measure(model: str, folder: Path, commit: str, threads: tuple[int, ...], repetitions: int) -> list[dict[str, Any]]:
    """Steps of a model, exported by a commit's code and by today's, at some numbers of threads."""
    earlier = folder / "code"
    codes = {EARLIER: earlier if earlier.exists() else code_of(commit, earlier), TODAY: ROOT}
    bundles = {name: export(model, code, folder / f"{model}-{name}") for name, code in codes.items()}
    return [_measure(model, bundles, count, repetitions) for count in threads]


def _measure(model: str, bundles: Mapping[str, Bundle], threads: int, repetitions: int) -> dict[str, Any]:
    x, y = random_batch(model)
    steps: dict[str, Callable[[], object]] = {}
    losses = {}
    for name, bundle in bundles.items():
        steps[name] = partial(open_engine(bundle, ENGINE, threads=threads).step, x, y, learning_rate=RATE, seed=0)
        losses[name] = steps[name]()
    if abs(losses[TODAY] / losses[EARLIER] - 1) > AGREEMENT:
        raise click.ClickException(f"{model}: expected the same loss of both graphs, found {losses}")
    row: dict[str, Any] = {"model": model, "threads": threads, "step": median_ms(steps, repetitions)}
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in bundles}
    for _ in range(repetitions):
        for name, bundle in bundles.items():
            turns[name].append(operators(bundle, x, y, threads=threads, repetitions=3))
    for what, left_out in SUMS.items():
        row[what] = {
            name: statistics.median(sum(op["ms"] for op in turn if op["operator"] not in left_out) for turn in found)
            for name, found in turns.items()
        }
    row["nodes"] = {name: sum(op["nodes"] for op in found[0]) for name, found in turns.items()}
    return row


def report(parts: Mapping[str, Any]) -> str:
    """Table of the results."""
    columns = {"step": 2, **dict.fromkeys(SUMS, 2), "nodes": 0}
    rows = [
        (
            row["model"],
            row["threads"],
            *(
                f"{row[what][EARLIER]:.{digits}f} -> {row[what][TODAY]:.{digits}f} "
                f"({row[what][TODAY] / row[what][EARLIER]:.2f})"
                for what, digits in columns.items()
            ),
        )
        for found in parts.values()
        for row in found
    ]
    title = f"milliseconds of a step of {BATCH} and its nodes, by the earlier exporter -> by today's (ratio); medians"
    return f"{title}\n\n{table(('model', 'threads', *columns), rows)}"


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--repetitions", default=5, show_default=True)
@click.option("--commit", default=BEFORE, show_default=True, help="Commit of the earlier exporter.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(
    models: str, threads: str, repetitions: int, commit: str, json_file: Path | None, kept: Path | None, again: bool
) -> None:
    """Measure, print the table, and write it as JSON."""
    counts = tuple(map(int, threads.split(",")))
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Callable[[], Any]] = {
            model: partial(measure, model, Path(name), commit, counts, repetitions) for model in models.split(",")
        }
        settings = {"batch": BATCH, "threads": counts, "repetitions": repetitions, "commit": commit}
        measured = measure_parts(parts, report, settings=settings, kept=kept, again=again)
    click.echo(report(measured))
    write_rows(json_file, chain.from_iterable(measured.values()))


if __name__ == "__main__":
    main()
