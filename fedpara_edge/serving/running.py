"""A server that runs: its state folder, its federation and its application on a socket, until it is told to stop."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.tables import max_update_bytes
from fedpara_edge.serving.application import Application
from fedpara_edge.serving.config import ServeConfig
from fedpara_edge.serving.connections import HEAD_SECONDS, Connection
from fedpara_edge.serving.evaluating import EvaluationSet, Evaluator
from fedpara_edge.serving.events import OnEvent
from fedpara_edge.serving.federation import Federation
from fedpara_edge.serving.folder import open_folder
from fedpara_edge.serving.guarding import NOTHING, Demands, open_guard
from fedpara_edge.serving.page import Page
from fedpara_edge.serving.record import Record, about
from fedpara_edge.serving.tokens import Tokens, open_tokens
from fedpara_edge.serving.uploads import Uploads
from fedpara_edge.storage.wholefile import MAX_BYTES, check_regular

_BACKLOG = 2048
_GRACE_SECONDS = 5
_M_ARENA_MAX = -8  # malloc.h of glibc


@dataclass(frozen=True, kw_only=True)
class Encryption:
    """Certificate with which a server answers over TLS.

    Args:
        certificate: File with the certificate and those between it and its authority, PEM.
        key: File with its private key, PEM.
        authority: Certificate of an authority of the server's own, for devices to trust; None for another one.
    """

    certificate: Path
    key: Path
    authority: Path | None = None

    def check(self) -> None:
        """Refuse files that are no certificate and its key.

        Raises:
            InputError: They are not.
        """
        try:
            for path in (self.certificate, self.key):
                check_regular(path, max_bytes=MAX_BYTES)
            # A password is asked for at the terminal unless one is given.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password=bytes)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"{self.certificate}: expected a certificate in PEM, and in {self.key} its private key without a "
                f"password, found {error.strerror or error}; check both files"
            ) from error


def unencrypted(_: Path) -> None:
    """No certificate."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that is about to answer.

    Args:
        host: Address that it listens on.
        port: Port that it listens on.
        federation: Federation that it runs.
        tokens: Tokens of the server.
        encryption: Certificate with which it answers; None for none.
        stop: Function that has it end, as a signal does; for the thread that it runs in, or a signal's handler.
    """

    host: str
    port: int
    federation: Federation
    tokens: Tokens
    encryption: Encryption | None
    stop: Callable[[], None]


def run_server(
    bundle: Bundle,
    state: Path,
    aggregate: AggregateConfig,
    config: ServeConfig,
    settings: Mapping[str, Any],
    *,
    host: str,
    port: int,
    page: Path | None = None,
    test: EvaluationSet | None = None,
    demands: Demands = NOTHING,
    encrypt: Callable[[Path], Encryption | None] = unencrypted,
    on_event: OnEvent,
    on_ready: Callable[[Running], None],
) -> None:
    """Run a server until SIGINT or SIGTERM.

    Args:
        bundle: Bundle that is trained.
        state: State folder, made if it is missing.
        aggregate: Aggregation of the updates.
        config: Conditions on which rounds open and close, and limits.
        settings: Options of the devices' training, by name.
        host: Address to listen on.
        port: Port to listen on; 0 for one that is free.
        page: Folder of the page for phones; None to hand out none.
        test: Data to evaluate the weights of each round on; None to leave that out.
        demands: Demands on updates beyond that they fit.
        encrypt: Function of the state folder with the certificate of the server; None there to answer without TLS.
        on_event: Function that is told what happens: the name of an event, `level` and fields.
        on_ready: Function that is called once the socket is open.

    Raises:
        BusyError: Another server uses the state folder.
        InputError: The address can't be used, or a folder has something else in it.
        WrongBundleError: The state belongs to another bundle.
        FedparaError: A file of the state is damaged or can't be written.
    """
    opened_page = None if page is None else Page(page)
    _allow_many_files()
    _share_memory()
    with ExitStack() as stack:
        folder = stack.enter_context(open_folder(state, bundle))
        listening = stack.enter_context(_listening(host, port))
        encryption = encrypt(folder.path)
        if encryption is not None:
            encryption.check()
        tokens = open_tokens(folder.path, make=True)
        told: list[Callable[[], None]] = []

        def tell(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
            on_event(name, level=level, **fields)
            for look in told:
                look()

        guard = stack.enter_context(open_guard(folder.path, demands, aggregate))
        federation = Federation(folder, aggregate, config, settings, guard=guard, on_event=tell)
        evaluate = None if test is None else Evaluator(bundle, test)
        if evaluate is not None:
            stack.callback(evaluate.stop)
        said = about(folder, settings, aggregate)
        record = Record(folder, config.rounds, said, evaluate=evaluate, on_event=tell)
        uploads = Uploads(folder.uploads, max_bytes=max_update_bytes(bundle.manifest.layout))
        authority = None if encryption is None else encryption.authority
        application = Application(
            federation, record, uploads, tokens, config, page=opened_page, authority=authority, on_event=tell
        )
        told.append(application.look)
        server, number = _Server(application, encryption), listening.getsockname()[1]
        running = Running(
            host=host,
            port=number,
            federation=federation,
            tokens=tokens,
            encryption=encryption,
            stop=server.stop,
        )
        with server.capture_signals():  # a signal may come as soon as somebody knows that it runs
            on_ready(running)
            asyncio.run(server.serve(sockets=[listening]))


class _Server(uvicorn.Server):
    """uvicorn's server for an application; requests that wait are answered when it is told to stop."""

    def __init__(self, application: Application, encryption: Encryption | None) -> None:
        super().__init__(
            uvicorn.Config(
                application.asgi,
                loop="asyncio",
                http=Connection,
                ws="none",
                log_config=None,
                log_level="error",  # not whatever a stranger sends
                access_log=False,
                server_header=False,
                timeout_keep_alive=int(HEAD_SECONDS),
                timeout_graceful_shutdown=_GRACE_SECONDS,
                ssl_certfile=None if encryption is None else encryption.certificate,
                ssl_keyfile=None if encryption is None else encryption.key,
            )
        )
        self._application = application

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGINT and SIGTERM, without raising them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)

    def stop(self) -> None:
        """Stop once the requests under way are answered."""
        self.should_exit = True
        self._application.end()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, at the second signal at once."""
        super().handle_exit(sig, frame)
        self._application.end()


def _allow_many_files() -> None:
    """Have as many connections as the system allows, rather than the few that processes begin with."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _share_memory() -> None:
    """Have all threads share two pools of memory, where glibc gives each its own, of which nothing is returned."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 2)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        InputError: The address can't be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        found = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port}: expected an address to listen on, found {found}; choose another") from error
    with opened:
        yield opened
