"""What signatures and bounds add to an aggregation, for updates of several codecs.

    python benchmarks/signatures.py --codec float32 --codec int8 --json signatures.json

Writes signed updates of a FedPara VGG16 (`aggregation.py`) into a temporary folder, codec by codec, and aggregates them
in one process, the kinds in turn, so that a busy machine is busy for all of them:

    plain    neither signatures nor bounds
    bounds   the bounds on what one client can do, as by default; none of these updates is clipped
    signed   signatures and ledger: each envelope verified, and SHA-256 of each file while it is read for the sum
    hash     SHA-256 of the files alone, on as many cores
    cached   SHA-256 of as many bytes that are in the processor's cache, as those read for the sum are

So `signed` takes at least as long as `plain` and `cached` together (`least`), however the work is arranged: SHA-256
alone takes longer than the sum of float32 updates. `plain` and `signed` are measured once more from a disk: with the
files out of the page cache, as they are some time after they were received.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import click
from aggregation import write_files
from parts import keep_options, measure_parts, write_rows

from fedpara_edge.aggregation import Bounds, aggregate
from fedpara_edge.aggregation.bounds import UNBOUNDED
from fedpara_edge.cli.output import table
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.storage.atomic import sha256_of
from fedpara_edge.trust.clients import Client, Clients, Member
from fedpara_edge.trust.envelope import write_envelope
from fedpara_edge.trust.keys import new_key, parse_public, read_signer
from fedpara_edge.trust.ledger import open_ledger
from fedpara_edge.trust.signatures import SignatureGate

CODECS = ("float32", "int8", "int4", "uniform:step=1")
RUN = "benchmark"
COLUMNS = (
    *("codec", "MB each", "plain s", "hash s", "cached s", "bounds", "signed", "least", "both"),
    *("disk: plain s", "disk: signed"),
)
CACHED_BYTES = 1 << 18


class Round:
    """Signed updates in a folder, with all that a server needs to aggregate them."""

    def __init__(self, folder: Path, updates: int, parameters: int, codec: str) -> None:
        write_files(folder, updates, parameters, codec)
        self.folder, self.paths = folder, sorted(folder.glob("update-*.safetensors"))
        self.weights: Weights = read_weights(folder / "base.safetensors")
        members = []
        for number, path in enumerate(self.paths):
            name = f"client-{number:05}"
            key = new_key(folder / name)
            write_envelope(path, path, read_signer(folder / name), RUN)
            members.append(Member(name=name, key=parse_public(key), entry=Client(key=key)))
        self.clients = Clients(run=RUN, members=members)
        os.sync()  # dirty pages stay in the cache

    def plain(self, bounds: Bounds = UNBOUNDED) -> None:
        aggregate(self.paths, self.weights, bounds=bounds)

    def signed(self, bounds: Bounds = UNBOUNDED) -> None:
        with open_ledger(self.folder / "ledger", RUN) as ledger:
            gate = SignatureGate(self.clients, ledger)
            done = aggregate(self.paths, self.weights, bounds=bounds, gate=gate, min_updates=len(self.paths))
            gate.record(done.identities, self.weights)

    def hash(self) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(sha256_of, self.paths))

    def hash_cached(self) -> None:
        piece = bytes(CACHED_BYTES)

        def hash_as_many(path: Path) -> None:
            found, size = sha256(), path.stat().st_size
            for start in range(0, size, CACHED_BYTES):
                found.update(piece[: size - start])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(hash_as_many, self.paths))

    def leave_cache(self) -> None:
        """Have the files read from the disk next time."""
        for path in self.paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(codec: str, updates: int, parameters: int, repetitions: int, folder: Path | None) -> dict[str, Any]:
    """Medians of all kinds for one codec, and their ratios to a plain aggregation."""
    with tempfile.TemporaryDirectory(prefix="signatures-", dir=folder) as name:
        round = Round(Path(name), updates, parameters, codec)
        kinds: dict[str, Callable[[], None]] = {
            "plain": round.plain,
            "bounds": partial(round.plain, Bounds()),
            "signed": round.signed,
            "both": partial(round.signed, Bounds()),
            "hash": round.hash,
            "cached": round.hash_cached,
            "disk plain": round.plain,
            "disk signed": round.signed,
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for kind in ["plain", *list(kinds) * repetitions]:
            if kind.startswith("disk"):
                round.leave_cache()
            started = time.perf_counter()
            kinds[kind]()
            seconds[kind].append(time.perf_counter() - started)
        size = round.paths[0].stat().st_size
    found = {kind: median(times[kind == "plain" :]) for kind, times in seconds.items()}
    ratios = {kind: found[kind] / found["plain"] for kind in ("bounds", "signed", "both")}
    ratios["least"] = (found["plain"] + found["cached"]) / found["plain"]
    ratios["disk signed"] = found["disk signed"] / found["disk plain"]
    return {"codec": codec, "bytes": size, "seconds": found, "ratios": ratios}


def report(updates: int, results: Sequence[Mapping[str, Any]]) -> str:
    """Table of the results."""
    rows = []
    for result in results:
        seconds, ratios = result["seconds"], result["ratios"]
        shown = [f"x {ratios[kind]:.2f}" for kind in ("bounds", "signed", "least", "both")]
        rows.append(
            (
                *(result["codec"], f"{result['bytes'] / 1e6:.2f}"),
                *(f"{seconds[kind]:.3f}" for kind in ("plain", "hash", "cached")),
                *(*shown, f"{seconds['disk plain']:.3f}", f"x {ratios['disk signed']:.2f}"),
            )
        )
    return f"{updates} updates, over a plain aggregation of the same files\n\n{table(COLUMNS, rows)}"


@click.command(help=__doc__)
@click.option("--codec", "codecs", multiple=True, default=CODECS, show_default=True)
@click.option("--updates", default=100, show_default=True)
@click.option("--parameters", default=5_000_000, show_default=True)
@click.option("--repetitions", default=5, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Folder in which to make the temporary folders.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="File for the numbers.")
@keep_options
def main(
    codecs: tuple[str, ...],
    updates: int,
    parameters: int,
    repetitions: int,
    folder: Path | None,
    output: Path | None,
    kept: Path | None,
    again: bool,
) -> None:
    measured = measure_parts(
        {codec: partial(measure, codec, updates, parameters, repetitions, folder) for codec in codecs},
        lambda parts: report(updates, [*parts.values()]),
        settings={"updates": updates, "parameters": parameters, "repetitions": repetitions},
        kept=kept,
        again=again,
    )
    click.echo(report(updates, [*measured.values()]))
    write_rows(output, measured.values())


if __name__ == "__main__":
    main()
