"""Codecs: bytes, error and speed, what encoding costs a device, and what decoding costs the server.

    python benchmarks/codecs.py --json codecs.json

Three tables. *Speed*: Laplace noise of about `--parameters` entries in the layout of a FedPara VGG16, for every codec,
and beside them zstd at level 3 on the float32 bytes and a plain conversion to float16, in MB of float32 a second, the
best of several runs on one thread. *On a device*: encoding an update of the FedPara CNN against the local epoch of 1000
images that made it. *On the server*: aggregating such updates (`aggregation.py`, two threads), each kind in a process
of its own and all in turn, with `--updates` files and with four times as many (x4): the memory must be the same, and
the fixed cost of an aggregation weighs less.
"""

from __future__ import annotations

import json
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
import zstandard
from aggregation import vgg16_layout
from parts import keep_options, measure_parts

from fedpara_edge.cli.output import table
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.demo import IMAGES
from fedpara_edge.formats.codecbench import USUAL, compare
from fedpara_edge.formats.encoded import open_encoded, read_change
from fedpara_edge.formats.weights import read_weights

HERE = Path(__file__).parent
ON_A_DEVICE = ("int8", "int4", "rotated:bits=2", "uniform:step=1", "uniform:step=2", "topk", "adaptive:error=0.5")
ON_THE_SERVER = ("float32", "int8", "int8:entropy=0", "int4", "int4:entropy=0", "uniform:step=1", "uniform:step=2")
EPOCH_IMAGES = 1000
GAMMAS = 101


def measure_speed(parameters: int, seconds: float) -> list[dict[str, Any]]:
    """Measure all codecs and the two conversions on noise."""
    layouts = (vgg16_layout(step / (GAMMAS - 1)) for step in range(GAMMAS))
    layout = min(layouts, key=lambda found: abs(found.shared_parameters - parameters))
    change = (0.01 * np.random.default_rng(0).laplace(size=layout.shared_parameters)).astype(np.float32)
    rows = [row.to_json() for row in compare(in_order(layout.shared), change, USUAL, seconds=seconds)]
    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    raw = change.tobytes()
    packed = compressor.compress(raw)
    half = change.astype(np.float16)
    plain = {
        "zstd -3": (len(packed), 0.0, lambda: compressor.compress(raw), lambda: decompressor.decompress(packed)),
        "astype(float16)": (
            half.nbytes,
            float(np.linalg.norm(half - change) / np.linalg.norm(change)),
            lambda: change.astype(np.float16),
            lambda: half.astype(np.float32),
        ),
    }
    for name, (size, error, encode, decode) in plain.items():
        rows.append(
            {
                "codec": name,
                "bytes": size,
                "bits_per_parameter": 8 * size / len(change),
                "error": error,
                "encode_mb_per_s": len(raw) / 1e6 / _best(encode, seconds),
                "decode_mb_per_s": len(raw) / 1e6 / _best(decode, seconds),
            }
        )
    return rows


def measure_device(seconds: float) -> dict[str, Any]:
    """Measure the local epoch of an exported CNN, and how long its update takes to encode."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = np.load(IMAGES)
        np.savez(folder / "d.npz", x=data["x_train"][:EPOCH_IMAGES], y=data["y_train"][:EPOCH_IMAGES])
        _fedpara_edge("export", "cnn", "--mean", "0.286", "--std", "0.353", "-o", folder / "bundle")
        trained = _fedpara_edge(
            "train", folder / "bundle", "--data", folder / "d.npz", "-o", folder / "u", "--lr", "0.1"
        )
        weights = read_weights(folder / "bundle" / "weights.safetensors")
        tensors = in_order(weights.layout.shared)
        with open_encoded(folder / "u", weights) as file:
            change = read_change(file, tensors)
        rows = [row.to_json() for row in compare(tensors, change, ON_A_DEVICE, seconds=seconds)]
    for row in rows:
        row["encode_ms"] = 4 * len(change) / 1e3 / row["encode_mb_per_s"]
        row["share_of_epoch"] = row["encode_ms"] / 1e3 / trained["seconds"]
    return {"epoch_seconds": trained["seconds"], "parameters": len(change), "codecs": rows}


def measure_server(parameters: int, updates: int, repetitions: int) -> list[dict[str, Any]]:
    """Measure the aggregation of each kind of update, and its memory for four times as many."""
    with tempfile.TemporaryDirectory(prefix="codecs-") as name:
        folders = {codec: Path(name) / str(number) for number, codec in enumerate(ON_THE_SERVER)}
        for codec, folder in folders.items():
            folder.mkdir()
            sizes = ("--updates", 4 * updates, "--parameters", parameters)
            _aggregation("--write", "--folder", folder, "--codec", codec, *sizes)
        few, many = ({codec: list[dict[str, float]]() for codec in folders} for _ in range(2))
        for _ in range(repetitions):
            for codec, folder in folders.items():
                for runs, count in ((few, updates), (many, 4 * updates)):
                    runs[codec].append(json.loads(_aggregation(*_measuring(folder, count))))
        sizes_mb = {codec: _megabytes(folder) for codec, folder in folders.items()}
    seconds, longer = (
        {codec: median(run["seconds"] for run in found) for codec, found in runs.items()} for runs in (few, many)
    )
    return [
        {
            "codec": codec,
            "updates": updates,
            "update_mb": sizes_mb[codec] / (4 * updates),
            "seconds": seconds[codec],
            "ns_per_parameter": 1e9 * seconds[codec] / updates / few[codec][0]["parameters"],
            "over_float32": seconds[codec] / seconds["float32"],
            "over_float32_of_four_times_as_many": longer[codec] / longer["float32"],
            "peak_mib": max(run["peak_mib"] for run in few[codec]),
            "peak_mib_of_four_times_as_many": max(run["peak_mib"] for run in many[codec]),
        }
        for codec in folders
    ]


def _measuring(folder: Path, updates: int) -> tuple[object, ...]:
    return ("--measure", "aggregate", "--folder", folder, "--updates", updates)


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("update-*")) / 1e6


def _best(call: Any, seconds: float) -> float:
    best, started = float("inf"), time.perf_counter()
    while True:
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
        if time.perf_counter() - started > seconds:
            return best


def _fedpara_edge(*arguments: object) -> Any:
    command = [sys.executable, "-m", "fedpara_edge", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _aggregation(*arguments: object) -> str:
    command = [sys.executable, str(HERE / "aggregation.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def count_parameters(speed: Sequence[Mapping[str, Any]]) -> int:
    """Number of entries of the noise."""
    return round(8 * speed[0]["bytes"] / speed[0]["bits_per_parameter"])


def report(results: Mapping[str, Any]) -> str:
    """Tables of the results."""
    parts = []
    if "speed" in results:
        header = ("codec", "bits", "error", "encode MB/s", "decode MB/s")
        rows = [
            (
                row["codec"],
                f"{row['bits_per_parameter']:.2f}",
                f"{row['error']:.4f}",
                f"{row['encode_mb_per_s']:.0f}",
                f"{row['decode_mb_per_s']:.0f}",
            )
            for row in results["speed"]
        ]
        count = count_parameters(results["speed"])
        parts.append(f"{count:,} parameters, MB of float32 a second on one thread\n\n{table(header, rows)}")
    if "device" in results:
        device = results["device"]
        header = ("codec", "bytes", "encode ms", "of the epoch")
        rows = [
            (row["codec"], f"{row['bytes']:,}", f"{row['encode_ms']:.1f}", f"{row['share_of_epoch']:.2%}")
            for row in device["codecs"]
        ]
        parts.append(
            f"encoding an update of the cnn, {device['parameters']:,} parameters, whose local epoch of {EPOCH_IMAGES} "
            f"images took {device['epoch_seconds']:.2f} s\n\n{table(header, rows)}"
        )
    if "server" in results:
        header = ("codec", "MB each", "seconds", "ns/parameter", "x float32", "of x4", "peak MiB", "of x4")
        rows = [
            (
                row["codec"],
                f"{row['update_mb']:.2f}",
                f"{row['seconds']:.3f}",
                f"{row['ns_per_parameter']:.2f}",
                f"{row['over_float32']:.2f}",
                f"{row['over_float32_of_four_times_as_many']:.2f}",
                f"{row['peak_mib']:.0f}",
                f"{row['peak_mib_of_four_times_as_many']:.0f}",
            )
            for row in results["server"]
        ]
        updates = results["server"][0]["updates"]
        parts.append(f"aggregating {updates} updates of such noise\n\n{table(header, rows)}")
    return "\n\n".join(parts)


@click.command()
@click.option("--parameters", type=int, default=5_000_000, show_default=True, help="Entries of the noise, roughly.")
@click.option(
    "--updates", type=int, default=20, show_default=True, help="Updates to aggregate; four times as many are written."
)
@click.option(
    "--repetitions", type=int, default=5, show_default=True, help="Runs of each aggregation; the median counts."
)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Time for each codec and each direction.")
@click.option(
    "--part",
    type=click.Choice(["speed", "device", "server"]),
    multiple=True,
    help="Table to make.  [default: all]",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for the numbers.")
@keep_options
def main(
    parameters: int,
    updates: int,
    repetitions: int,
    seconds: float,
    part: tuple[str, ...],
    json_file: Path | None,
    kept: Path | None,
    again: bool,
) -> None:
    """Measure the size, error and speed of the codecs, and print the tables."""
    measurements = {
        # First, as a process starts with the peak memory of the one it was forked from.
        "server": partial(measure_server, parameters, updates, repetitions),
        "speed": partial(measure_speed, parameters, seconds),
        "device": partial(measure_device, seconds),
    }
    results = measure_parts(
        {name: measure for name, measure in measurements.items() if not part or name in part},
        report,
        settings={"parameters": parameters, "updates": updates, "repetitions": repetitions, "seconds": seconds},
        kept=kept,
        again=again,
    )
    if "speed" in results:
        results["parameters"] = count_parameters(results["speed"])
    print(report(results))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
