"""Time and memory of training on a device: `ort-training` against torch eager, FedPara against dense.

Steps are taken in turn by all that are compared, in one process, and each figure is a median; only the ratios are meant
to be carried elsewhere. A cold start is a whole process: `fedpara-edge train` on one batch, from its start to its end.

    python benchmarks/device.py --json device.json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.nn import functional as F

from device_runtime import open_engine
from export import ExportOptions, export_bundle
from fedpara_edge.cli.output import table
from fedpara_edge.nn import ZOO

BATCH, RATE, STEPS_A_TURN = 32, 0.01, 3
LAUNCHER = """
import json, os, resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}))
"""
"""Runs a command and prints its time and peak memory; small itself, for a child starts out as large as its parent."""

MEMORY_LIMITS_MB = {"mlp": 100, "cnn": 160}


def steppers(model: str, kind: Any, threads: int, folder: Path) -> dict[str, Callable[[], object]]:
    """One training step of the same model in each runtime, on the same batch."""
    torch.manual_seed(0)
    entry = ZOO[model]
    module = entry.factory(kind=kind)
    options = ExportOptions(name=model, input_shape=entry.input_shape)
    bundle, _ = export_bundle(module, folder / f"{model}-{kind}", options, overwrite=True)
    engine = open_engine(bundle, "ort-training", threads=threads)
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (BATCH, *entry.input_shape)).astype(np.uint8)
    y = generator.integers(0, 10, BATCH)
    x_torch, y_torch = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)

    def torch_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(x_torch.float() / 255), y_torch).backward()
        optimizer.step()

    return {
        f"ort {kind}": lambda: engine.step(x, y, learning_rate=RATE, seed=0),
        f"torch {kind}": torch_step,
    }


def median_ms(steps: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn, a few steps at a time.

    Before its turn there is a pause, as the threads of the one before go on spinning for a while, and a warm-up step.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            time.sleep(0.05)
            step()
            for _ in range(STEPS_A_TURN):
                started = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_steps(model: str, threads: int, folder: Path, repetitions: int) -> dict[str, Any]:
    """Step times of FedPara and dense in both runtimes, and their ratios."""
    torch.set_num_threads(threads)
    steps = steppers(model, "fedpara", threads, folder) | steppers(model, "dense", threads, folder)
    ms = median_ms(steps, repetitions)
    return {
        "model": model,
        "threads": threads,
        "ms": ms,
        "ort_over_torch": ms["ort fedpara"] / ms["torch fedpara"],
        "ort_over_torch_dense": ms["ort dense"] / ms["torch dense"],
        "fedpara_over_dense": ms["ort fedpara"] / ms["ort dense"],
    }


def measure_cold_start(model: str, folder: Path, repetitions: int) -> dict[str, Any]:
    """Seconds and peak resident MB of `fedpara-edge train` for one step on one batch, as whole processes."""
    entry = ZOO[model]
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (BATCH, *entry.input_shape)).astype(np.uint8)
    np.savez(folder / "batch.npz", x=x, y=generator.integers(0, 10, BATCH))
    seconds, megabytes = [], []
    for _ in range(repetitions):
        command = [sys.executable, "-m", "fedpara_edge", "train", str(folder / f"{model}-fedpara")]
        command += ["--data", str(folder / "batch.npz"), "-o", str(folder / "update.safetensors"), "--force", "--json"]
        done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout)
        seconds.append(measured["seconds"])
        megabytes.append(measured["peak"] * (1024 if sys.platform == "linux" else 1) / 1e6)
    return {
        "model": model,
        "seconds": statistics.median(seconds),
        "peak_mb": statistics.median(megabytes),
        "limit_mb": MEMORY_LIMITS_MB.get(model),
    }


def report(results: dict[str, Any]) -> str:
    """The results as two tables."""
    steps = [
        (
            row["model"],
            row["threads"],
            *(f"{row['ms'][name]:.2f}" for name in ("ort fedpara", "torch fedpara", "ort dense", "torch dense")),
            *(f"{row[name]:.2f}" for name in ("ort_over_torch", "ort_over_torch_dense", "fedpara_over_dense")),
        )
        for row in results["steps"]
    ]
    starts = [
        (row["model"], f"{row['seconds']:.2f}", f"{row['peak_mb']:.0f}", row["limit_mb"] or "-")
        for row in results["cold_starts"]
    ]
    first = ("model", "threads", "ort FedPara", "torch FedPara", "ort dense", "torch dense")
    ratios = ("ort/torch FedPara", "ort/torch dense", "FedPara/dense in ort")
    return (
        f"milliseconds a step of {BATCH} (medians) and ratios\n\n{table((*first, *ratios), steps)}\n\n"
        "`fedpara-edge train` of one step, whole process\n\n"
        f"{table(('model', 'seconds', 'peak MB', 'limit MB'), starts)}"
    )


@click.command()
@click.option("--repetitions", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(repetitions: int, json_file: Path | None) -> None:
    """Measure, print the tables, and write them as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = [
            measure_steps(model, threads, folder, repetitions)
            for model in ("mlp", "cnn", "resnet18")
            for threads in (1, 2)
        ]
        cold_starts = [measure_cold_start(model, folder, 5) for model in ("mlp", "cnn", "resnet18")]
    results = {"batch": BATCH, "steps": steps, "cold_starts": cold_starts}
    click.echo(report(results))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
