"""What a server for devices holds: many simulated ones that do the same at the same time.

    python benchmarks/serving.py --devices 100 --devices 1000 --rounds 6 --json serving.json

`fedpara-edge serve` runs in a process of its own with the zoo's mlp. The devices are coroutines of this process: each
joins, gets its task, manifest and weights, sends an update of random values in int8, in two requests and with a
connection for each as the agent does, and waits for the next round. All begin at once, on the same cores as the server.
Columns:

    errors       connections and answers after which an agent would have to try again
    updates/s    updates that were taken, over the time from the first request to the last weights
    ms, 99 %     time of a request, but for those that wait for a round: median, and 99th percentile
    MiB          resident memory of the server: before the first device, after half of the rounds, after the last

Every update counts in its round, or the benchmark fails.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np
from parts import keep_options, measure_parts, write_rows

from device_runtime.agent.link import read_link
from fedpara_edge.cli.output import table
from fedpara_edge.codecs import find_encoder
from fedpara_edge.formats.bundle import MANIFEST
from fedpara_edge.formats.update import UpdateHeader, write_update
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.storage.rounds import round_path

COLUMNS = ("devices", "errors", "updates/s", "ms", "99 %", "MiB before", "half", "last")
WAIT_SECONDS = 50
AGAIN_SECONDS = 0.5
PARTIAL = {"Content-Type": "application/partial-upload", "Upload-Offset": "0", "Upload-Complete": "?1"}
Headers = dict[str, str]


@dataclass
class Load:
    """Devices at a server, and what they saw.

    Args:
        port: Port of the server.
        join: Token that lets them in.
        rounds: Rounds of each device.
        folder: Folder with the bundle and the server's state.
    """

    port: int
    join: str
    rounds: int
    folder: Path
    errors: int = 0
    taken: int = 0
    seconds: list[float] = field(default_factory=list)
    weights: dict[int, Weights] = field(default_factory=dict)

    async def ask(
        self, method: str, place: str, token: str, body: bytes = b"", headers: Headers | None = None
    ) -> tuple[Headers, bytes]:
        """Fields and body of an answer, asked for until there is one."""
        fields = headers or {}
        while True:
            started = time.perf_counter()
            try:
                status, found, content = await self._once(method, place, token, body, fields)
                if status < 400:
                    if "Prefer" not in fields:
                        self.seconds.append(time.perf_counter() - started)
                    return found, content
            except (OSError, asyncio.IncompleteReadError):
                pass
            self.errors += 1
            await asyncio.sleep(AGAIN_SECONDS)

    async def _once(
        self, method: str, place: str, token: str, body: bytes, fields: Headers
    ) -> tuple[int, Headers, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            all_fields = {
                "Host": "localhost", "Connection": "close", "Authorization": f"Bearer {token}",
                "Content-Length": str(len(body)), **fields,
            }  # fmt: skip
            head = "".join(f"{name}: {value}\r\n" for name, value in all_fields.items())
            writer.write(f"{method} /{place.lstrip('/')} HTTP/1.1\r\n{head}\r\n".encode() + body)
            await writer.drain()
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            found = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            content = await reader.readexactly(int(found["content-length"])) if "content-length" in found else b""
            return int(first.split()[1]), found, content
        finally:
            writer.close()

    async def device(self, number: int) -> None:
        """A device's life."""
        secret = f"{number:032}"
        _, joined = await self.ask("POST", "join", self.join, json.dumps({"secret": secret}).encode())
        member = json.loads(joined)
        client, token = member["client"], member["token"]
        for round_ in range(self.rounds):
            task = await self._task(token)
            assert task["round"] == round_
            if round_ == 0:
                await self.ask("GET", f"{task['bundle']}/{MANIFEST}", token)
            await self.ask("GET", task["weights"], token)
            update = self._update(client, round_)
            fields = {"Upload-Complete": "?0", "Upload-Length": str(len(update))}
            begun, _ = await self.ask("POST", "updates", token, headers=fields)
            await self.ask("PATCH", begun["location"], token, update, PARTIAL)
            self.taken += 1

    async def _task(self, token: str) -> dict[str, Any]:
        while True:
            _, content = await self.ask("GET", "task.json", token, headers={"Prefer": f"wait={WAIT_SECONDS}"})
            task: dict[str, Any] = json.loads(content)
            if task["train"]:
                return task

    def _update(self, client: str, number: int) -> bytes:
        if number not in self.weights:
            path = round_path(self.folder / "server" / "weights", number)
            self.weights[number] = read_weights(path if number else self.folder / "bundle" / "weights.safetensors")
        weights, random = self.weights[number], np.random.default_rng(int(client, 16))
        header = UpdateHeader(
            fingerprint=weights.fingerprint, round=number, base=weights.base, client=client, examples=100, steps=4,
            metrics={"loss": 1.0},
        )  # fmt: skip
        change = {
            tensor.name: random.standard_normal(tensor.shape, np.float32) * np.float32(0.01)
            for tensor in weights.layout.shared
        }
        path = self.folder / "update.safetensors"
        write_update(path, header, weights.layout, change, encoder=find_encoder("int8"))
        return path.read_bytes()


@contextmanager
def serving(folder: Path, devices: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process, and its join link."""
    command = [sys.executable, "-m", "fedpara_edge", "serve", "bundle", "--state", "server", "--port", "0"]
    options = ["--updates", str(devices), "--codec", "int8", "--downlink-codec", "int8"]
    with subprocess.Popen(
        [*command, *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


def resident_mib(process: subprocess.Popen[str]) -> float:
    """Memory of a process that is in use."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def measure(devices: int, rounds: int) -> dict[str, Any]:
    """What a server with some devices came to."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export = [sys.executable, "-m", "fedpara_edge", "export", "mlp", "--engines", "onnxruntime", "-o", "bundle"]
        subprocess.run(export, cwd=folder, check=True, capture_output=True)
        with serving(folder, devices) as (process, text):
            link = read_link(text)
            load = Load(int(link.url.rstrip("/").rpartition(":")[2]), str(link.token), rounds, folder)
            mib = [resident_mib(process)]
            started = time.perf_counter()
            asyncio.run(run(load, devices, process, mib))
            seconds = time.perf_counter() - started
        for number in range(rounds):
            result = json.loads((folder / "server" / "rounds" / str(number) / "result.json").read_text())
            counted = {update["client"] for update in result["accepted"]}
            assert (len(counted), result["rejected"]) == (devices, [])
    cuts = quantiles(load.seconds, n=100)
    return {
        "devices": devices,
        "errors": load.errors,
        "updates_per_second": load.taken / seconds,
        "request_ms": 1000 * median(load.seconds),
        "request_ms_99": 1000 * cuts[98],
        "mib": mib,
    }


async def run(load: Load, devices: int, process: subprocess.Popen[str], mib: list[float]) -> None:
    """All devices at once; the server's memory after half of the rounds and after the last is added to `mib`."""
    tasks = [asyncio.create_task(load.device(number)) for number in range(devices)]
    for number in (load.rounds // 2, load.rounds):
        while not (load.folder / "server" / "rounds" / str(number) / "opened.json").exists():
            failed = [task for task in tasks if task.done() and task.exception() is not None]
            if failed:
                await failed[0]
            await asyncio.sleep(0.05)
        mib.append(resident_mib(process))
    await asyncio.gather(*tasks)


def report(rounds: int, rows: Sequence[dict[str, Any]]) -> str:
    """The measurements as text."""
    lines = [
        (
            str(row["devices"]), str(row["errors"]), f"{row['updates_per_second']:.0f}", f"{row['request_ms']:.0f}",
            f"{row['request_ms_99']:.0f}", *(f"{mib:.0f}" for mib in row["mib"]),
        )
        for row in rows
    ]  # fmt: skip
    return f"{rounds} rounds, all devices at once\n\n{table(COLUMNS, lines)}"


@click.command()
@click.option("--devices", "counts", type=int, multiple=True, default=(100, 1000), show_default=True)
@click.option("--rounds", type=click.IntRange(2), default=6, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="File for the numbers.")
@keep_options
def main(counts: tuple[int, ...], rounds: int, output: Path | None, kept: Path | None, again: bool) -> None:
    measured = measure_parts(
        {f"{count} devices": partial(measure, count, rounds) for count in counts},
        lambda parts: report(rounds, [*parts.values()]),
        settings={"rounds": rounds},
        kept=kept,
        again=again,
    )
    click.echo(report(rounds, [*measured.values()]))
    write_rows(output, measured.values())


if __name__ == "__main__":
    main()
