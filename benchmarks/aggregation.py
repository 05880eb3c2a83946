"""Aggregation of updates against merely reading them: time and memory, side by side.

    python benchmarks/aggregation.py --updates 100 400 --parameters 5000000 --json aggregation.json

Writes as many float32 updates of a FedPara VGG16 (tensor form, γ chosen to meet `--parameters`) into a temporary folder
as the largest of `--updates`, 8 GB for the numbers above, and removes them at the end. Every measurement is a process
of its own; the kinds take turns, so that a busy machine is busy for all of them:

    aggregate    `fedpara_edge.aggregation.aggregate`, screening, bounds and gap included
    trimmed, …   the same with a robust rule (`--rules`), whose ratio is that to the mean
    reads        the same files, unbuffered, into one buffer of 1 MiB
    read_bytes   the same files, `Path.read_bytes` one after the other

The files are in the page cache (they were just written, and each is read once before), so that this compares
computations and not disks: from a disk, reading takes longer and the ratio nears 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation import aggregate
from fedpara_edge.aggregation.rules import find_rule
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.codecs import find_encoder
from fedpara_edge.factors.compose import factor_shapes
from fedpara_edge.factors.layout import LayerSpec, Layout, TensorSpec
from fedpara_edge.factors.rank import scheduled_rank
from fedpara_edge.formats.update import UpdateHeader, write_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
KINDS = ("aggregate", "reads", "read_bytes")
RULES = ("trimmed", "median", "multi-krum", "geometric-median")
MIB = 1 << 20


def vgg16_layout(gamma: float) -> Layout:
    """Layout of VGG16 with normalization, FedPara of that γ in tensor form; first layer and classifier stay dense."""
    layers, tensors = [], []
    for number, (inputs, outputs) in enumerate(zip((3, *CHANNELS), CHANNELS, strict=False)):
        shape = (outputs, inputs, 3, 3)
        layer = LayerSpec(
            name=f"conv{number:02}",
            operator="conv2d",
            kind="fedpara" if number else "dense",
            form="tensor",
            shape=shape,
            rank=scheduled_rank(shape, gamma=gamma) if number else 0,
        )
        layers.append(layer)
        shapes = {**factor_shapes(layer), "bias": (outputs,)}
        tensors += [_tensor(layer.name, part, size, part) for part, size in shapes.items()]
        tensors += [_tensor(f"norm{number:02}", name, (outputs,), "norm") for name in ("weight", "bias")]
    for name, rows in (("linear1", 512), ("linear2", 512), ("head", 10)):
        layers.append(LayerSpec(name=name, operator="linear", kind="dense", form="matrix", shape=(rows, 512), rank=0))
        tensors += [_tensor(name, "weight", (rows, 512), "weight"), _tensor(name, "bias", (rows,), "bias")]
    return Layout(tuple(layers), tuple(tensors))


def _tensor(layer: str, name: str, shape: tuple[int, ...], part: Any) -> TensorSpec:
    return TensorSpec(name=f"{layer}.{name}", shape=shape, dtype="float32", layer=layer, part=part, role="shared")


def write_files(folder: Path, updates: int, parameters: int, codec: str = "float32") -> None:
    """Write base weights and updates of about that many parameters."""
    encoder = find_encoder(codec)
    layout = min(
        (vgg16_layout(step / 100) for step in range(101)), key=lambda found: abs(found.shared_parameters - parameters)
    )
    random = np.random.default_rng(0)
    base = {tensor.name: _noise(random, tensor.shape, 0.125) for tensor in layout.shared}
    path = folder / "base.safetensors"
    write_weights(path, Weights("0" * 64, 0, layout, base))
    weights = read_weights(path)
    noise = _noise(random, (layout.shared_parameters + 1000 * updates,), 0.01)
    for number in range(updates):
        change, start = {}, 1000 * number
        for tensor in layout.shared:
            change[tensor.name] = noise[start : start + tensor.size].reshape(tensor.shape)
            start += tensor.size
        header = UpdateHeader(
            fingerprint=weights.fingerprint,
            round=0,
            base=weights.base,
            client=f"client-{number:05}",
            examples=100 + number,
            steps=10,
            metrics={"loss": 1.5},
        )
        write_update(folder / f"update-{number:05}.safetensors", header, layout, change, encoder=encoder)


def _noise(random: np.random.Generator, shape: tuple[int, ...], deviation: float) -> NDArray[np.float32]:
    return random.standard_normal(shape, np.float32) * np.float32(deviation)


def measure(kind: str, folder: Path, updates: int) -> dict[str, float]:
    """Run one kind once; return the seconds it took and the peak memory of the process."""
    paths = sorted(folder.glob("update-*.safetensors"))[:updates]
    result: dict[str, float] = {}
    if kind not in ("reads", "read_bytes"):
        method = Method() if kind == "aggregate" else Method(rule=find_rule(kind))
        weights = read_weights(folder / "base.safetensors")
        start = time.perf_counter()
        aggregation = aggregate(paths, weights, method=method)
        result["seconds"] = time.perf_counter() - start
        result["gap"] = aggregation.gap.relative if aggregation.gap else 0.0
        result["parameters"] = weights.layout.shared_parameters
    else:
        start = time.perf_counter()
        for path in paths:
            if kind == "read_bytes":
                path.read_bytes()
            else:
                _read(path)
        result["seconds"] = time.perf_counter() - start
    scale = 1 if sys.platform == "darwin" else 1024
    return {**result, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / MIB}


def _read(path: Path, buffer: bytearray = bytearray(MIB)) -> None:  # noqa: B008  (one buffer for all files)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def compare(folder: Path, updates: int, repetitions: int, rules: Sequence[str] = ()) -> dict[str, Any]:
    """Medians of all kinds for a number of updates, and the ratios to plain reads and to the mean."""
    kinds = (*KINDS, *rules)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(repetitions):
        for kind in kinds:
            runs[kind].append(json.loads(_run("--measure", kind, "--folder", folder, "--updates", updates)))
    seconds = {kind: median(run["seconds"] for run in runs[kind]) for kind in kinds}
    return {
        "updates": updates,
        "parameters": int(runs["aggregate"][0]["parameters"]),
        "seconds": seconds,
        "ratio_to_reads": seconds["aggregate"] / seconds["reads"],
        "ratio_to_read_bytes": seconds["aggregate"] / seconds["read_bytes"],
        "peak_mib": {kind: max(run["peak_mib"] for run in runs[kind]) for kind in kinds},
        "ratio_to_mean": {rule: seconds[rule] / seconds["aggregate"] for rule in rules},
    }


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """Table of the results."""
    lines = ["updates  parameters  aggregate s  reads s  read_bytes s  x reads  x read_bytes  peak MiB"]
    for result in results:
        seconds = result["seconds"]
        lines.append(
            f"{result['updates']:7}  {result['parameters']:10}  {seconds['aggregate']:11.3f}  {seconds['reads']:7.3f}  "
            f"{seconds['read_bytes']:12.3f}  {result['ratio_to_reads']:7.2f}  {result['ratio_to_read_bytes']:12.2f}  "
            f"{result['peak_mib']['aggregate']:8.1f}"
        )
    for result in results:
        for rule, ratio in result["ratio_to_mean"].items():
            lines.append(
                f"{result['updates']:7}  {rule}: {result['seconds'][rule]:.3f} s, {ratio:.1f} x the mean, "
                f"{result['peak_mib'][rule]:.1f} MiB"
            )
    return "\n".join(lines)


def _run(*arguments: object) -> str:
    # A process starts with the peak memory of the one it was forked from, so this one must stay small.
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, nargs="+", default=[100, 400], help="numbers of updates to compare")
    parser.add_argument("--parameters", type=int, default=5_000_000, help="approximate number of shared parameters")
    parser.add_argument("--codec", default="float32", help="codec of the updates")
    parser.add_argument("--rules", nargs="*", default=RULES, help="robust rules to compare with the mean")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each kind; the median counts")
    parser.add_argument("--folder", type=Path, help="folder in which to make the temporary folder")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--kept", type=Path, help="file that keeps what was measured")
    parser.add_argument("--again", action="store_true", help="measure again what is kept")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        write_files(options.folder, options.updates[0], options.parameters, options.codec)
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.updates[0])))
        return
    from parts import measure_parts  # not at the top, as the processes that are measured would pay for it

    with tempfile.TemporaryDirectory(prefix="aggregation-", dir=options.folder) as name:
        folder = Path(name)

        @cache
        def write() -> None:
            sizes = ("--updates", max(options.updates), "--parameters", options.parameters)
            _run("--write", "--folder", folder, "--codec", options.codec, *sizes)
            _run("--measure", "reads", "--folder", folder, "--updates", max(options.updates))

        def measure_updates(updates: int) -> dict[str, Any]:
            write()
            return compare(folder, updates, options.repetitions, options.rules)

        measured = measure_parts(
            {f"{updates} updates": partial(measure_updates, updates) for updates in options.updates},
            lambda parts: report([*parts.values()]),
            settings={name: getattr(options, name) for name in ("parameters", "codec", "repetitions", "rules")},
            kept=options.kept,
            again=options.again,
        )
    results = [*measured.values()]
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps({"cpus": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
