"""What the digest of a file, the sums of an update and sums without rounding add to what the server does anyway.

    python benchmarks/digests.py --json digests.json

With files of a FedPara VGG16 (`aggregation.py`), in one process, the kinds in turn, from the page cache:

    plain     the file read whole into memory, and nothing else
    without   weights or a server state read and verified, of a file that states no digest
    with      the same of a file as it is written
    base      the same as `without`, and the digest that updates state of their base: what `with` has found on the way

then `aggregate` of updates as they are written, beside the same of such that state neither sums nor a digest, which
is what noticing a flipped value costs, and `aggregate` with `--exact` beside the same without.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
from aggregation import write_files
from parts import keep_options, measure_parts

from fedpara_edge.aggregation import aggregate
from fedpara_edge.algorithms import find_server
from fedpara_edge.cli.output import table
from fedpara_edge.codecs.sums import FIELD as SUMS
from fedpara_edge.errors import FedparaError
from fedpara_edge.formats.serverstate import read_server_state, state_of, write_server_state
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.storage.digest import FIELD
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

Kinds = Mapping[str, Callable[[], object]]


def without_digest(path: Path) -> Path:
    """A copy of a file that states no digest and no sums."""
    with TensorFile(path, format=None, error=FedparaError) as file:
        header = {name: value for name, value in file.header.items() if name not in (FIELD, SUMS)}
        copy = path.with_name(f"{path.name}.old")
        write_tensors(copy, {name: file.read(name) for name in file.entries}, header)
    return copy


def in_turn(kinds: Kinds, repetitions: int) -> dict[str, float]:
    """Median seconds of each kind, after a turn that does not count."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(repetitions + 1):
        for kind, run in kinds.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[kind].append(time.perf_counter() - started)
    return {kind: median(times) for kind, times in seconds.items()}


def measure_weights(folder: Path, parameters: int, repetitions: int) -> dict[str, Any]:
    """Seconds for a weights file."""
    write_files(folder, 0, parameters)
    path = folder / "base.safetensors"
    old = without_digest(path)
    kinds: Kinds = {
        "plain": path.read_bytes,
        "without": partial(read_weights, old),
        "with": partial(read_weights, path),
        "base": lambda: read_weights(old).base,
    }
    return {"bytes": path.stat().st_size, "seconds": in_turn(kinds, repetitions)}


def measure_state(folder: Path, parameters: int, repetitions: int) -> dict[str, Any]:
    """Seconds for the server state of FedAdam, which has two tensors for each of the weights."""
    write_files(folder, 0, parameters)
    weights, algorithm = read_weights(folder / "base.safetensors"), find_server("fedadam")
    groups = dict.fromkeys(algorithm.groups, weights.tensors)
    path = folder / "state.safetensors"
    write_server_state(path, state_of(weights, algorithm, groups))
    old = without_digest(path)
    kinds: Kinds = {
        "plain": path.read_bytes,
        "without": partial(read_server_state, old),
        "with": partial(read_server_state, path),
    }
    return {"bytes": path.stat().st_size, "seconds": in_turn(kinds, repetitions)}


def measure_sums(folder: Path, parameters: int, repetitions: int, updates: int, codec: str) -> dict[str, Any]:
    """Seconds for a round of updates that state sums, and of the same that state none."""
    write_files(folder, updates, parameters, codec)
    paths, weights = sorted(folder.glob("update-*.safetensors")), read_weights(folder / "base.safetensors")
    kinds: Kinds = {
        "without": partial(aggregate, [without_digest(path) for path in paths], weights),
        "with": partial(aggregate, paths, weights),
    }
    return {"bytes": paths[0].stat().st_size, "seconds": in_turn(kinds, repetitions)}


def measure_exact(folder: Path, parameters: int, repetitions: int, updates: int, codec: str) -> dict[str, Any]:
    """Seconds for a round, rounded and exact."""
    write_files(folder, updates, parameters, codec)
    paths, weights = sorted(folder.glob("update-*.safetensors")), read_weights(folder / "base.safetensors")
    kinds: Kinds = {
        "rounded": partial(aggregate, paths, weights),
        "exact": partial(aggregate, paths, weights, exact=True),
    }
    return {"bytes": paths[0].stat().st_size, "seconds": in_turn(kinds, repetitions)}


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of the results."""
    files, sums, rounds = [], [], []
    for name, result in results.items():
        seconds, size = result["seconds"], f"{result['bytes'] / 1e6:.1f}"
        if "rounded" in seconds:
            rounds.append((name, size, *_beside(seconds, "rounded", "exact")))
        elif "plain" in seconds:
            kinds = [f"{1e3 * seconds[kind]:.1f}" for kind in ("plain", "without", "with")]
            base = f"{1e3 * seconds['base']:.1f}" if "base" in seconds else ""
            files.append((name, size, *kinds, base, f"x {seconds['with'] / seconds['without']:.2f}"))
        else:
            sums.append((name.removesuffix(" with sums"), size, *_beside(seconds, "without", "with")))
    tables = (
        (("file", "MB", "plain ms", "without ms", "with ms", "base ms", "with/without"), files),
        (("updates", "MB each", "without sums s", "with sums s", "with/without"), sums),
        (("updates", "MB each", "rounded s", "exact s", "exact/rounded"), rounds),
    )
    return "\n\n".join(table(header, rows) for header, rows in tables if rows)


def _beside(seconds: Mapping[str, float], one: str, other: str) -> tuple[str, str, str]:
    return f"{seconds[one]:.3f}", f"{seconds[other]:.3f}", f"x {seconds[other] / seconds[one]:.2f}"


@click.command(help=__doc__)
@click.option("--updates", default=40, show_default=True)
@click.option("--parameters", default=5_000_000, show_default=True)
@click.option("--repetitions", default=5, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Folder in which to make the temporary folders.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="File for the numbers.")
@keep_options
def main(
    updates: int,
    parameters: int,
    repetitions: int,
    folder: Path | None,
    output: Path | None,
    kept: Path | None,
    again: bool,
) -> None:
    def in_folder(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="digests-", dir=folder) as name:
            return function(Path(name), parameters, repetitions, *arguments)

    measured = measure_parts(
        {
            "weights": partial(in_folder, measure_weights),
            "server state": partial(in_folder, measure_state),
            **{
                f"{updates} {codec} with sums": partial(in_folder, measure_sums, updates, codec)
                for codec in ("float32", "int8")
            },
            **{
                f"{updates} {codec}": partial(in_folder, measure_exact, updates, codec) for codec in ("float32", "int8")
            },
        },
        report,
        settings={"updates": updates, "parameters": parameters, "repetitions": repetitions},
        kept=kept,
        again=again,
    )
    click.echo(report(measured))
    if output is not None:
        output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
