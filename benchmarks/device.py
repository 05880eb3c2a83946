"""Time and memory of training on a device: both engines against torch eager, FedPara against dense.

All contenders take steps in turn, in one process, and each figure is a median; only the ratios are meant to carry over
to other machines. A cold start is a whole process: `fedpara-edge train` on one batch, from start to end. A limit is
what the convolutions and other products of the FedPara model would take at the rate of a large matrix product
(`limits`).

    python benchmarks/device.py --json device.json
    python benchmarks/device.py --profile             # time by operator in a step of the engine onnxruntime
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from limits import operators, peak_gflops, step_gflops
from parts import keep_options, measure_parts
from torch.nn import functional as F

from device_runtime import open_engine
from export import export_bundle
from fedpara_edge.cli.output import table
from fedpara_edge.formats.bundle import ENGINES, Bundle, open_bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import ZOO

BATCH, RATE, STEPS_A_TURN = 32, 0.01, 3
LAUNCHER = """
import json, os, resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}))
"""
"""Script that runs a command and prints its time and peak memory; small, as a child starts as large as its parent."""

MEMORY_LIMITS_MB = {"mlp": 80, "cnn": 140}
MODELS = ("mlp", "cnn", "resnet18", "vgg16")
GROWTH = {"gamma 0.02": {"gamma": 0.02}, "gamma 0.44": {"gamma": 0.44}, "dense": {"kind": "dense"}}
"""Variants of vgg16 with about 1, 5 and 15 million weights."""


def export(model: str, folder: Path, **factory: Any) -> tuple[Bundle, torch.nn.Module]:
    """Bundle of a zoo model for both engines, and the model."""
    torch.manual_seed(0)
    entry = ZOO[model]
    module = entry.factory(**factory)
    config = ExportConfig(name=model, input_shape=entry.input_shape, input_dtype=entry.input_dtype)
    bundle, _ = export_bundle(module, folder, config)
    return bundle, module


def random_batch(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Batch of random images and labels."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (BATCH, *ZOO[model].input_shape)).astype(np.uint8)
    return x, generator.integers(0, 10, BATCH)


def steppers(model: str, kind: str, threads: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Functions that take one training step of the same model on the same batch, by runtime."""
    path = folder / f"{model}-{kind}-{threads}"
    bundle, module = export(model, path, kind=kind)
    x, y = random_batch(model)
    x_torch, y_torch = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)

    def torch_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(x_torch.float() / 255), y_torch).backward()
        optimizer.step()

    steps: dict[str, Callable[[], object]] = {f"torch {kind}": torch_step}
    for name in ENGINES:
        engine = open_engine(bundle, name, threads=threads)
        steps[f"{name} {kind}"] = partial(engine.step, x, y, learning_rate=RATE, seed=0)
    return steps


def median_ms(steps: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of a step by runtime; the runtimes take turns of a few steps.

    Each turn begins with a pause, as the threads of the previous runtime spin on for a while, and with a warm-up step.
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
    """Step times of FedPara and dense in all runtimes, and their ratios."""
    torch.set_num_threads(threads)
    steps = steppers(model, "fedpara", threads, folder) | steppers(model, "dense", threads, folder)
    ms = median_ms(steps, repetitions)
    ours = ms["onnxruntime fedpara"]
    gflop, peak = step_gflops(steps["torch fedpara"]), peak_gflops(threads)
    limit_ms = 1e3 * sum(gflop.values()) / peak
    return {
        "model": model,
        "threads": threads,
        "ms": ms,
        "over_torch": ours / ms["torch fedpara"],
        "over_ort_training": ours / ms["ort-training fedpara"],
        "fedpara_over_dense": ours / ms["onnxruntime dense"],
        "dense_over_torch": ms["onnxruntime dense"] / ms["torch dense"],
        "gflop": gflop,
        "peak_gflops": peak,
        "limit_ms": limit_ms,
        "over_limit": ours / limit_ms,
    }


def profile(model: str, threads: int, folder: Path, repetitions: int) -> str:
    """Text about a step of the FedPara model in the engine onnxruntime: the time of its operators, beside its limit."""
    torch.set_num_threads(threads)
    steps = steppers(model, "fedpara", threads, folder)
    x, y = random_batch(model)
    bundle = open_bundle(folder / f"{model}-fedpara-{threads}")
    rows = operators(bundle, x, y, threads=threads, repetitions=repetitions)
    total = sum(row["ms"] for row in rows)
    gflop, peak = step_gflops(steps["torch fedpara"]), peak_gflops(threads)
    convolutions, other = (1e3 * gflop[name] / peak for name in ("convolutions", "other"))
    cells = [(row["operator"], row["nodes"], f"{row['ms']:.2f}", f"{row['ms'] / total:.1%}") for row in rows]
    return (
        f"{model}, {threads} threads: {sum(row['nodes'] for row in rows)} nodes, {total:.2f} ms; limit "
        f"{convolutions + other:.2f} ms, {convolutions:.2f} of it convolutions, at {peak:.0f} GFLOP/s\n\n"
        f"{table(('operator', 'nodes', 'ms', 'share'), cells)}\n"
    )


def measure_start(model: str, engine: str, folder: Path, repetitions: int) -> dict[str, Any]:
    """Measure cold starts of the FedPara model."""
    path = folder / f"{model}-cold"
    if not path.exists():
        export(model, path)
    measured = measure_process(model, path, engine, repetitions)
    return {"model": model, "limit_mb": MEMORY_LIMITS_MB.get(model), **measured}


def measure_process(model: str, bundle: Path, engine: str, repetitions: int) -> dict[str, Any]:
    """Seconds and peak resident MB of `fedpara-edge train` for one step on one batch, as whole processes."""
    x, y = random_batch(model)
    data, update = bundle.parent / "batch.npz", bundle.parent / "update.safetensors"
    np.savez(data, x=x, y=y)
    command = [sys.executable, "-m", "fedpara_edge", "train", str(bundle), "--engine", engine]
    command += ["--data", str(data), "-o", str(update), "--overwrite", "--json"]
    seconds, megabytes = [], []
    for _ in range(repetitions):
        done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout)
        seconds.append(measured["seconds"])
        megabytes.append(measured["peak"] * (1024 if sys.platform == "linux" else 1) / 1e6)
    return {"engine": engine, "seconds": statistics.median(seconds), "peak_mb": statistics.median(megabytes)}


def measure_growth(label: str, factory: dict[str, Any], folder: Path, repetitions: int) -> dict[str, Any]:
    """Step time and memory of vgg16 in the engine onnxruntime, by the number of its weights."""
    bundle, module = export("vgg16", folder / label.replace(" ", "-"), **factory)
    engine = open_engine(bundle, "onnxruntime", threads=2)
    x, y = random_batch("vgg16")
    step = partial(engine.step, x, y, learning_rate=RATE, seed=0)
    return {
        "vgg16": label,
        "millions": sum(parameter.numel() for parameter in module.parameters()) / 1e6,
        "step_ms": median_ms({label: step}, repetitions)[label],
        "peak_mb": measure_process("vgg16", bundle.path, "onnxruntime", 3)["peak_mb"],
    }


def grouped(parts: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Results of all parts, by table."""
    rows: dict[str, list[Any]] = {"steps": [], "cold_starts": [], "growth": []}
    for result in parts.values():
        rows["steps" if "over_torch" in result else "growth" if "millions" in result else "cold_starts"].append(result)
    return rows


def report(results: Mapping[str, Any]) -> str:
    """Tables of the results."""
    runtimes = ("onnxruntime", "ort-training", "torch")
    steps = [
        (
            row["model"],
            row["threads"],
            *(f"{row['ms'][f'{runtime} {kind}']:.2f}" for kind in ("fedpara", "dense") for runtime in runtimes),
            f"{row['limit_ms']:.2f}",
        )
        for row in results["steps"]
    ]
    ratios = [(row["model"], row["threads"], *(f"{row[name]:.2f}" for name in _RATIOS)) for row in results["steps"]]
    starts = [
        (row["model"], row["engine"], f"{row['seconds']:.2f}", f"{row['peak_mb']:.0f}", row["limit_mb"] or "-")
        for row in results["cold_starts"]
    ]
    growth = [
        (row["vgg16"], f"{row['millions']:.2f}", f"{row['step_ms']:.0f}", f"{row['peak_mb']:.0f}")
        for row in results["growth"]
    ]
    heads = [f"{runtime} {kind}" for kind in ("FedPara", "dense") for runtime in runtimes]
    tables = [
        (f"milliseconds a step of {BATCH} (medians)", ("model", "threads", *heads, "limit FedPara"), steps),
        ("ratios", ("model", "threads", *_RATIOS.values()), ratios),
        (
            "`fedpara-edge train` of one step, whole process",
            ("model", "engine", "seconds", "peak MB", "limit MB"),
            starts,
        ),
        (
            "vgg16 by its number of weights, engine onnxruntime, 2 threads",
            ("vgg16", "million weights", "ms a step", "peak MB"),
            growth,
        ),
    ]
    return "\n\n".join(f"{title}\n\n{table(header, rows)}" for title, header, rows in tables if rows)


_RATIOS = {
    "over_torch": "onnxruntime/torch",
    "over_ort_training": "onnxruntime/ort-training",
    "fedpara_over_dense": "FedPara/dense",
    "dense_over_torch": "dense: onnxruntime/torch",
    "over_limit": "onnxruntime/limit",
}


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--repetitions", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--profile", "profiling", is_flag=True, help="Print the time of each operator in a step instead.")
@keep_options
def main(
    models: str, repetitions: int, json_file: Path | None, profiling: bool, kept: Path | None, again: bool
) -> None:
    """Measure, print the tables, and write them as JSON."""
    names = models.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if profiling:
            for model, threads in itertools.product(names, (1, 2)):
                click.echo(profile(model, threads, folder, repetitions))
            return
        parts: dict[str, Callable[[], Any]] = {
            f"step of {model}, {threads} threads": partial(measure_steps, model, threads, folder, repetitions)
            for model in names
            for threads in (1, 2)
        }
        for model in names:
            for engine in ("onnxruntime", "ort-training"):
                parts[f"start of {model}, {engine}"] = partial(
                    measure_start, model, engine, folder, min(repetitions, 5)
                )
        if "vgg16" in names:
            for label, factory in GROWTH.items():
                parts[f"vgg16, {label}"] = partial(measure_growth, label, factory, folder, repetitions)
        settings = {"batch": BATCH, "repetitions": repetitions}
        measured = measure_parts(parts, lambda found: report(grouped(found)), settings=settings, kept=kept, again=again)
    results = {"batch": BATCH, **grouped(measured)}
    click.echo(report(results))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
