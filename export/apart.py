"""Native code in a process of its own, as a user's graph may crash it.

onnxruntime and, above all, onnxruntime-training divide by zero, read past the end of an array or run out of stack on
some graphs; then the process is gone, and with it what the user had not saved. So everything that makes, loads or runs
a graph of a user's model does so in a second process of the exporter, which is started once, serves one call at a time
and ends with this one. Functions, arguments and results go through its pipes, pickled.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import IO, Any, TypeVar

T = TypeVar("T")


class CrashError(Exception):
    """The second process ended in the middle of a call; the message says how, as the end of a sentence."""


def apart(function: Callable[..., T], *args: Any) -> T:
    """Result of a function of a module, called in the second process.

    Raises:
        CrashError: The process ended.
        Exception: What the function raised; a RuntimeError with its text if it can't be pickled.
    """
    result: T = _process.ask("call", function, args)
    return result


class Apart:
    """An object in the second process.

    Args:
        make: Class or function of a module that makes it.
        args: Arguments of `make`.
    """

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        self._key = _process.ask("make", make, args)
        weakref.finalize(self, _process.dropped.append, self._key)

    def call(self, method: str, *args: Any) -> Any:
        """Result of a method."""
        return _process.ask("method", self._key, method, args)


def prepare(*modules: str) -> None:
    """Start the second process, which imports some modules while this one goes on."""
    _process.tell("prepare", modules)


class _Process:
    """The second process, started when first needed and after each crash.

    Attributes:
        dropped: Keys of its objects that are no longer in use here, of which the next message tells it.
    """

    def __init__(self) -> None:
        self.dropped: list[tuple[int, int]] = []
        self._lock = threading.RLock()
        self._owner = 0
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, *message: Any) -> Any:
        """Answer to a message."""
        with self._lock:
            self.tell(*message)
            assert self._running is not None
            try:
                right, answer = pickle.load(_pipe(self._running.stdout))
            except EOFError as error:
                raise CrashError(_end_of(self._running)) from error
            except BaseException:  # the answer to this message must not be taken for that to the next
                self.stop()
                raise
        if right:
            return answer
        raise answer

    def tell(self, *message: Any) -> None:
        """Send a message."""
        with self._lock:
            process = self._started()
            gone = [self.dropped.pop() for _ in range(len(self.dropped))]
            try:
                pickle.dump((gone, *message), _pipe(process.stdin), protocol=pickle.HIGHEST_PROTOCOL)
                _pipe(process.stdin).flush()
            except BrokenPipeError as error:
                raise CrashError(_end_of(process)) from error

    def stop(self) -> None:
        """End the process."""
        with self._lock:
            if self._running is not None and self._owner == os.getpid():
                self._running.kill()
                _end_of(self._running)
            self._running = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._owner != os.getpid() or self._running.poll() is not None:
            self._running = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import sys; sys.path[:] = {sys.path!r}; from export import apart; apart.serve()",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._running


def serve() -> None:
    """Serve the messages from stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code may print
    objects: dict[tuple[int, int], Any] = {}
    while True:
        try:
            gone, *message = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001  (an argument that can't be made here)
            _answer(answers, False, error)
            continue
        for key in gone:
            objects.pop(key, None)
        if message[0] == "prepare":
            for module in message[1]:
                _import_quietly(module)
            continue
        try:
            _answer(answers, True, _result(objects, *message))
        except Exception as error:  # noqa: BLE001  (whatever it is, the first process raises it)
            _answer(answers, False, error)


def _result(objects: dict[tuple[int, int], Any], kind: str, *message: Any) -> Any:
    if kind == "method":
        key, name, args = message
        return getattr(objects[key], name)(*args)
    function, args = message
    result = function(*args)
    if kind == "call":
        return result
    key = os.getpid(), next(_numbers)
    objects[key] = result
    return key


_numbers = itertools.count()


def _answer(pipe: IO[bytes], right: bool, answer: Any) -> None:
    try:
        pickled = pickle.dumps((right, answer), protocol=pickle.HIGHEST_PROTOCOL)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001  (such as an exception of onnxruntime)
        pickled = pickle.dumps((False, RuntimeError(str(answer))))
    pipe.write(pickled)
    pipe.flush()


def _import_quietly(module: str) -> None:
    try:
        __import__(module)
    except ImportError:  # the call that needs it says so
        return


def _end_of(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # of what it did not read
            _pipe(stream).close()
    try:
        return f"that it ends the process with {signal.Signals(-code).name}"
    except ValueError:
        return f"that it ends the process with exit code {code}"


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


_process = _Process()
atexit.register(_process.stop)
