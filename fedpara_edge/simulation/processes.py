"""The workers of a simulation: processes with one thread each; with a GPU, threads of this process that share it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from fedpara_edge.simulation.torchengine.stopping import stopping
from fedpara_edge.storage.locking import hold

Result = TypeVar("Result")

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_holding = ExitStack()


@dataclass(frozen=True)
class Workers:
    """Workers by what they do.

    Args:
        engines: Workers that train and evaluate.
        files: Workers that aggregate and measure, on a CPU alone.
    """

    engines: Executor
    files: Executor


@contextmanager
def open_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for as long as the context lasts; if it is left by an exception, no training takes a further step."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="client")
    try:
        yield pool
    except BaseException:
        stopping.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        stopping.clear()


class _Pool(ProcessPoolExecutor):
    """Starts its processes with SIGINT held back until they are ready for it."""

    def submit(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Submit a task, as to every executor."""
        with _holding_back_interrupts():
            return super().submit(function, *args, **kwargs)


@contextmanager
def open_pool(workers: int, lock: Path) -> Iterator[ProcessPoolExecutor]:
    """Worker processes for as long as the context lasts; if it is left by an exception, they take no further step.

    Args:
        workers: Number of processes.
        lock: Lock of the run folder, which they hold until they end.
    """
    others = set(multiprocessing.active_children())
    with environment(dict.fromkeys(ONE_THREAD, "1")):
        pool = _Pool(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(lock,),
        )
        try:
            yield pool
        except BaseException:
            _interrupt(set(multiprocessing.active_children()) - others)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _interrupt(processes: set[BaseProcess]) -> None:
    # Not SIGTERM: ended while it sends a result, a worker would leave the pool waiting for the rest of it.
    if sys.platform != "win32":
        for process in processes:
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)


def start_worker(lock: Path) -> None:
    """Prepare this process to be a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but a training stops at it (`device_runtime.interrupts`)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _holding.enter_context(hold(lock, folder=lock.parent.parent, kind="a run", alone=False))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed can't end its workers, and they must not work on beside the next run.
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _holding_back_interrupts() -> Iterator[None]:
    """SIGINT waits, in this thread and in the processes that it starts, which inherit that."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes to start: numpy reads its number of threads when it is imported."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
