"""Flower's simulation engine as an executor of a simulation's tasks.

A task of a client is a message to the SuperNode that Flower simulates for it, and is done by whatever actor of ray is
free. Rounds, files and metrics stay those of `fedpara_edge.simulation`, so that they come to the same to the bit. A
message has no weights in it, but says where they are in the run folder, and few are under way at a time; so the server
needs no more memory for more clients than Flower needs to know them.

Functions and results are pickled between processes of this machine, as by ray itself and by `multiprocessing`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpara_edge.errors import FedparaError, brief_text
from fedpara_edge.fleet.switches import SWITCHES
from fedpara_edge.simulation.processes import ONE_THREAD, environment
from fedpara_edge.storage.locking import hold

Result = TypeVar("Result")

POLL_SECONDS = 0.02
AT_ONCE = 16
"""Messages under way for each actor: Flower looks for new ones ten times a second, and an actor may do more in that."""
OF_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "RAY_agent_register_timeout_ms": "300000",
}
"""Switches of ray: it tells nobody, its actors get the same share of a processor as other programs, and it has patience
on a machine that has much else to do."""
STORE_BYTES = 100 << 20
"""Memory that ray's object store gets, which tasks hardly use; ray takes a third of the machine's otherwise."""

app = ClientApp()
_holding = ExitStack()


@app.train()
def run_task(message: Message, _: Context) -> Message:
    """Do a task, in an actor."""
    task: Any = message.content["task"]
    _prepare(Path(str(task["lock"])))
    function, arguments, options = pickle.loads(task["call"])
    found: tuple[Any, BaseException | None]
    try:
        found = function(*arguments, **options), None
    except BaseException as error:  # noqa: BLE001  # it is raised where the result is asked for
        found = None, error
    record = ConfigRecord({"found": pickle.dumps(found), "actor": os.getpid()})
    return Message(RecordDict({"task": record}), reply_to=message)


@cache
def _prepare(lock: Path) -> None:
    """Hold the lock of a run folder until this process ends, so that no other run begins before that."""
    with suppress(ValueError):  # of another thread than the first
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # but a training stops at it (`device_runtime.interrupts`)
    _holding.enter_context(hold(lock, folder=lock.parent.parent, kind="a run", alone=False))


class NodeExecutor(Executor):
    """An executor whose tasks are messages to SuperNodes; those of one `client` go to the same one.

    Args:
        lock: Lock of the run folder, which actors hold.
        at_once: Most messages under way.
    """

    def __init__(self, lock: Path, *, at_once: int) -> None:
        self._lock, self._at_once = lock, at_once
        self._waiting: deque[tuple[str | None, bytes, Future[Any]]] = deque()
        self._open: dict[str, Future[Any]] = {}
        self._owed: set[Future[Any]] = set()
        self._actors: set[int] = set()
        self._changing, self._closed = threading.Lock(), threading.Event()
        self._reason: object = None

    def submit(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Submit a task, as to every executor."""
        future: Future[Result] = Future()
        call = pickle.dumps((function, args, kwargs))
        with self._changing:
            if self._closed.is_set():
                raise self._broken()
            self._owed.add(future)
            self._waiting.append((kwargs.get("client"), call, future))
        return future

    def serve(self, grid: Grid, count: int) -> None:
        """Push tasks to that many nodes and pull their results, until the executor is closed."""
        while len(list(grid.get_node_ids())) < count:
            time.sleep(POLL_SECONDS)
        free, nodes = cycle(grid.get_node_ids()), dict[str, int]()
        while not self._closed.is_set():
            while self._waiting and len(self._open) < self._at_once:
                client, call, future = self._waiting.popleft()
                node = next(free) if client is None else nodes.setdefault(client, next(free))
                record = ConfigRecord({"lock": str(self._lock), "call": call})
                message = Message(RecordDict({"task": record}), dst_node_id=node, message_type="train")
                self._open.update((number, future) for number in grid.push_messages([message]))
            replies = list(grid.pull_messages(self._open)) if self._open else []
            for reply in replies:
                self._settle(self._open.pop(reply.metadata.reply_to_message_id), reply)
            if not replies:
                self._closed.wait(POLL_SECONDS)

    def _settle(self, future: Future[Any], reply: Message) -> None:
        with self._changing:
            if future not in self._owed:
                return
            self._owed.remove(future)
        if reply.has_error():
            self._reason = reply.error.reason
            future.set_exception(self._broken())
            return
        answer: Any = reply.content["task"]
        self._actors.add(answer["actor"])
        result, error = pickle.loads(answer["found"])
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def close(self, reason: BaseException | None = None) -> None:
        """Take no further tasks, and give up those that are not done."""
        with self._changing:
            self._reason = self._reason or reason
            self._closed.set()
            owed, self._owed = self._owed, set()
        for future in owed:
            future.set_exception(self._broken())

    def interrupt(self) -> None:
        """Have actors take no further step of a training."""
        for process in self._actors:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGINT)

    def _broken(self) -> FedparaError:
        found = brief_text(" ".join(str(self._reason).split()), max_length=300)
        return FedparaError(
            f"Flower's simulation: expected actors that work to the end, found {found}; the same command goes on from "
            "the last round"
        )


@contextmanager
def open_nodes(workers: int, *, clients: int, lock: Path) -> Iterator[Executor]:
    """An executor on Flower's simulation engine, for as long as the context lasts.

    Args:
        workers: Number of actors, with one thread each.
        clients: Number of SuperNodes.
        lock: Lock of the run folder, which the actors hold until they end.
    """
    executor, server = NodeExecutor(lock, at_once=AT_ONCE * workers), ServerApp()

    @server.main()
    def serve(grid: Grid, _: Context) -> None:
        executor.serve(grid, clients)

    def run() -> None:
        from flwr.simulation import run_simulation

        try:
            run_simulation(server, app, clients, backend_config=_backend(workers))
        except BaseException as error:  # noqa: BLE001  # it is raised where a result is asked for
            executor.close(error)
        executor.close()

    for name in ("flwr", "ray", "ray._private.worker"):  # what goes wrong is raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with environment({**SWITCHES, **OF_RAY, **dict.fromkeys(ONE_THREAD, "1")}):
        engine = threading.Thread(target=run, name="flower")
        engine.start()
        try:
            yield executor
        except BaseException:
            executor.interrupt()
            raise
        finally:
            executor.close()
            engine.join()


def _backend(workers: int) -> dict[str, Any]:
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    init: dict[str, Any] = {"num_cpus": workers, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    init |= {"log_to_driver": False, "logging_level": logging.CRITICAL}
    return {"init_args": init, "client_resources": resources}
