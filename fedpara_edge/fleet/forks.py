"""Flower's programs as forks of this process: each begins in milliseconds, and none outlives this process.

Flower starts a Python process for every message, which takes two seconds of a core before it does anything. A fork has
all modules already. So `Forks` runs the functions behind Flower's commands (`flower-superlink`, `flwr-clientapp`, …) in
forks of a process that imported them once, and has the SuperExec of each node fork for its tasks as well (`replaced`).

A fork is the leader of a session of its own, so that Ctrl-C on a terminal reaches this process alone, which then ends
the forks in order. If this process is killed there is nobody to do that: so each fork reads from a pipe that nobody
writes to, and ends when the pipe does.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from device_runtime.engines.registry import ENGINES
from fedpara_edge.fleet.replaced import check_flower, replace_popen

STOP_SECONDS = 8.0
"""Time that a program gets to end after SIGTERM."""
_KILLED = 137

Program = Callable[[], Any]


class Forks:
    """Programs of Flower that run as forks, to be stopped together.

    Args:
        logs: Folder for what they print, a file for each.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._life, self._end = os.pipe()
        self._running: dict[int, str] = {}
        self._ended: dict[int, int] = {}
        self._programs = _programs()

    def start(
        self,
        command: str,
        *arguments: str,
        log: str,
        before: Callable[[], object] = lambda: None,
        after_task: Callable[[], object] = lambda: None,
    ) -> int:
        """Start a command of Flower; its process id.

        Args:
            command: Name of the command.
            arguments: Arguments of the command.
            log: Name of the file for what it prints.
            before: Function to call in the new process before the command.
            after_task: Function that each task calls at its end, for a SuperExec.
        """

        def run() -> None:
            os.close(self._end)
            _end_with(self._life)
            before()
            if command == "flower-superexec":
                self._fork_for_tasks(after_task)
            self._run(command, arguments)

        path = self._logs / f"{log}.log"
        pid = _fork(lambda: _in_session(run, path))
        self._running[pid] = log
        return pid

    def ended(self, pid: int) -> int | None:
        """Exit code of a program; None while it runs."""
        with suppress(ChildProcessError):
            while pid in self._running:
                found, status = os.waitpid(pid, os.WNOHANG)
                if not found:
                    return None
                del self._running[pid]
                self._ended[pid] = os.waitstatus_to_exitcode(status)
        return self._ended.get(pid, _KILLED)

    def stop(self) -> None:
        """End all programs, the last first."""
        self.end(*reversed(self._running))
        os.close(self._end)
        os.close(self._life)

    def end(self, *pids: int) -> None:
        """End programs and what they started, by SIGTERM, and by SIGKILL those that don't end in time."""
        for pid in pids:
            _signal(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and any(self.ended(pid) is None for pid in pids):
            time.sleep(0.02)
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        while any(self.ended(pid) is None for pid in pids):
            time.sleep(0.02)

    def _run(self, command: str, arguments: Sequence[str]) -> None:
        sys.argv = [command, *arguments]
        self._programs[command]()

    def _fork_for_tasks(self, after_task: Callable[[], object]) -> None:
        """Have this process, a SuperExec, fork where it would start a new Python, for as long as Flower lets us."""

        def popen(arguments: Sequence[str]) -> None:
            def run() -> None:
                _end_with(self._life)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    self._run(arguments[0], arguments[1:])
                finally:
                    after_task()

            _fork(run)

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # or else tasks that ended stay as zombies
        replace_popen(popen)


@contextmanager
def running_forks(logs: Path) -> Iterator[Forks]:
    """Forks that are stopped when the context ends.

    Args:
        logs: Folder for what they print.

    Raises:
        FedparaError: This release of Flower is another than the one that they are made for.
    """
    check_flower()
    _import_apps()
    forks = Forks(logs)
    try:
        yield forks
    finally:
        forks.stop()


def _import_apps() -> None:
    """Import what tasks run, before they are forked."""
    for name in ("fedpara_edge.fleet.client", "fedpara_edge.fleet.server"):
        importlib.import_module(name)
    for engine in ENGINES.values():
        with suppress(ImportError):  # the engine of this device is another
            importlib.import_module(engine.module)


def _programs() -> Mapping[str, Program]:
    """The functions behind Flower's commands, imported."""
    scripts = metadata.distribution("flwr").entry_points.select(group="console_scripts")
    wanted = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp", "flwr")
    found = {script.name: script for script in scripts}
    return {name: found[name].load() for name in wanted}


def _fork(run: Callable[[], None]) -> int:
    """Run a function in a fork, which ends with it; the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _finish(run)
    return pid


def _finish(run: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            with suppress(Exception):
                stream.flush()  # type: ignore[union-attr]
        os._exit(code)


def _in_session(run: Callable[[], None], log: Path) -> None:
    """Run a function with signals, streams and a session as a new process would have them."""
    os.setsid()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", line_buffering=True) for number in (1, 2)
    )
    run()


def _end_with(pipe: int) -> None:
    """End this process when nobody holds the other end of the pipe any more."""

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        os._exit(_KILLED)

    threading.Thread(target=watch, daemon=True).start()


def _signal(pid: int, number: int) -> None:
    """Signal a program and, as its session has one group, all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
