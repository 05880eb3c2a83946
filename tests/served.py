"""Servers for tests: a federation on its folder, one that answers in a thread, and one in a process to be killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small_round import send
from softmax_regression import make_bundle

from device_runtime.agent.connection import Connection
from device_runtime.agent.link import JoinLink
from device_runtime.agent.member import Member
from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.serving.config import ServeConfig
from fedpara_edge.serving.evaluating import EvaluationSet
from fedpara_edge.serving.federation import Federation
from fedpara_edge.serving.folder import open_folder
from fedpara_edge.serving.guarding import NOTHING, Demands
from fedpara_edge.serving.record import Evaluate, Record, about
from fedpara_edge.serving.running import Running, run_server

SECONDS = 30.0
"""Longest time for which anything here waits."""
AVERAGING = AggregateConfig()


def wait_until(holds: Callable[[], bool], told: object = "") -> None:
    """Wait for what a server does after it has answered, or fail with what was told."""
    until = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < until, told
        time.sleep(0.01)


def bundle_in(folder: Path) -> Bundle:
    """A bundle without personal tensors."""
    return make_bundle(folder / "bundle", personal=False)


@contextmanager
def federation_in(
    folder: Path,
    bundle: Bundle,
    *,
    aggregate: AggregateConfig = AVERAGING,
    clock: Any = lambda: 0.0,
    **config: Any,
) -> Iterator[Federation]:
    """A federation that goes on in a state folder."""
    with open_folder(folder, bundle) as opened:
        yield Federation(opened, aggregate, ServeConfig(**config), {"lr": 0.1}, clock=clock)


def record_in(
    federation: Federation, *, evaluate: Evaluate | None = None, rounds: int | None = None, events: Any = None
) -> Record:
    """The record of a federation."""
    folder = federation._folder
    said = about(folder, {"lr": 0.1}, AVERAGING)
    hear = (lambda *_, **__: None) if events is None else lambda name, **fields: events.append((name, fields))
    return Record(folder, rounds, said, evaluate=evaluate, on_event=hear)


def update_of(folder: Path, weights: Weights, client: str, **changed: Any) -> Path:
    """An update of a client, in a file of its own."""
    folder.mkdir(exist_ok=True)
    return send(folder, weights, client, name=f"{client}-{weights.round}", **changed)


@dataclass
class Served:
    """A server in a thread.

    Args:
        running: The server.
        events: What it told, in order.
    """

    running: Running
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.running.host}:{self.running.port}/"

    @property
    def link(self) -> JoinLink:
        """A join link."""
        return JoinLink(url=self.url, token=self.running.tokens.make("join", expires=time.time() + 60))

    def member(self, folder: Path, client: str) -> Member:
        """A member that has joined."""
        folder.mkdir(exist_ok=True)
        member = Member(folder, Connection(self.url))
        member.join(self.link, client)
        return member

    def wait_for_round(self, number: int) -> Weights:
        """Weights of a round, once it is open."""
        wait_until(lambda: self.running.federation.number >= number, self.events)
        return self.running.federation.current.base


@contextmanager
def serving(
    state: Path,
    bundle: Bundle,
    *,
    aggregate: AggregateConfig = AVERAGING,
    settings: Mapping[str, Any] | None = None,
    page: Path | None = None,
    test: EvaluationSet | None = None,
    demands: Demands = NOTHING,
    port: int = 0,
    **config: Any,
) -> Iterator[Served]:
    """A server that answers while the context lasts."""
    ready, found, failed = threading.Event(), list[Running](), list[BaseException]()
    events: list[tuple[str, Mapping[str, Any]]] = []

    def hear(name: str, *, level: int = 0, **fields: Any) -> None:  # noqa: ARG001
        events.append((name, fields))

    def begin(running: Running) -> None:
        found.append(running)
        ready.set()

    def run() -> None:
        try:
            run_server(
                bundle, state, aggregate, ServeConfig(**config), settings or {"lr": 0.1}, host="127.0.0.1", port=port,
                page=page, test=test, demands=demands, on_event=hear, on_ready=begin,
            )  # fmt: skip
        except BaseException as error:  # noqa: BLE001  (raised again where the server is used)
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(SECONDS)
    if failed:
        raise failed[0]
    try:
        yield Served(found[0], events)
    finally:
        found[0].stop()
        thread.join(SECONDS)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


class Process:
    """A server in a process of its own, at one address however often it is killed.

    Args:
        folder: Folder with the bundle, in which the state folder `server` is.
        options: Options of `fedpara-edge serve`.
    """

    def __init__(self, folder: Path, *options: str, scheme: str = "http") -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._folder, self._options, self._scheme = folder, options, scheme
        self.link = ""

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "fedpara_edge", "serve", "bundle", "--state", "server"]
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port), *self._options],
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdout is not None
        self.link = self._process.stdout.readline().strip()
        assert self.link.startswith(self.url), self._process.wait(SECONDS)

    def kill(self) -> None:
        """Kill it, as the system does without memory."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Have it end; its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        self._process.send_signal(number)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._process.wait(SECONDS)


def base_of(bundle: Bundle) -> Weights:
    """Weights of round 0."""
    return read_weights(bundle.file("weights.safetensors"))
