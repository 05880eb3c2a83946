"""Calls by which a process changes files, native code's included: counted, refused, or made its last one.

The kernel (Linux, seccomp user notifications) holds every such call of a forked child until this process has decided
on it. So a function can be killed in its n-th call, or find the disk full from there on, without a debugger, root or a
special disk. `fsync` is answered without waiting for the disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

_BY_MACHINE = {
    "x86_64": {
        "seccomp": 317, "write": 1, "pwrite64": 18, "writev": 20, "pwritev": 296, "pwritev2": 328, "sendfile": 40,
        "copy_file_range": 326, "open": 2, "openat": 257, "creat": 85, "rename": 82, "renameat": 264,
        "renameat2": 316, "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266, "unlink": 87, "unlinkat": 263,
        "mkdir": 83, "mkdirat": 258, "rmdir": 84, "truncate": 76, "ftruncate": 77, "fallocate": 285, "fsync": 74,
        "fdatasync": 75, "chmod": 90, "fchmod": 91, "fchmodat": 268,
    },
    "aarch64": {
        "seccomp": 277, "write": 64, "pwrite64": 68, "writev": 66, "pwritev": 70, "pwritev2": 287, "sendfile": 71,
        "copy_file_range": 285, "openat": 56, "renameat": 38, "renameat2": 276, "linkat": 37, "symlinkat": 36,
        "unlinkat": 35, "mkdirat": 34, "truncate": 45, "ftruncate": 46, "fallocate": 47, "fsync": 82,
        "fdatasync": 83, "fchmod": 52, "fchmodat": 53,
    },
}  # fmt: skip
_NUMBERS = _BY_MACHINE.get(platform.machine(), {}) if sys.platform == "linux" else {}
_NAMES = {number: name for name, number in _NUMBERS.items() if name != "seccomp"}
_DESCRIPTOR_AT = dict.fromkeys(("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "ftruncate"), 0)
_DESCRIPTOR_AT |= dict.fromkeys(("fallocate", "fsync", "fdatasync", "fchmod"), 0) | {"copy_file_range": 2}
"""Argument with the open file of the calls that have one."""
_PATH_AT = {"renameat": 3, "renameat2": 3, "rename": 1, "linkat": 3, "link": 1, "symlinkat": 2, "symlink": 1}
"""Argument with the path that is made, of the calls with two paths."""
SYNCS = ("fsync", "fdatasync")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
KILL = 0
"""In place of an error number: the process is killed in the call, halfway through what it writes."""


@dataclass(frozen=True)
class Call:
    """A call that changes something below the folder that is watched.

    Args:
        name: Name of the system call.
        path: Path that is written, made or removed, below that folder.
        source: Path that is renamed or linked, for the calls that have one.
    """

    name: str
    path: str
    source: str = ""

    @property
    def takes_space(self) -> bool:
        """Whether it can fail for want of space."""
        return self.name not in ("unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "truncate")


@dataclass(frozen=True)
class Fault:
    """What happens to calls from one of them on.

    Args:
        at: Number of the first such call, from 0 on.
        error: Number of the error that the calls end with, or `KILL`.
        lasts: Whether all calls after it fail as well; of `ENOSPC`, those that take space.
    """

    at: int
    error: int = KILL
    lasts: bool = False

    def hits(self, number: int, call: Call) -> bool:
        """Whether a call is one of them."""
        if number == self.at or (number > self.at and self.lasts):
            return self.error != errno.ENOSPC or call.takes_space
        return False


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        code: Exit code; None if it was killed.
        out: Standard output.
        err: Standard error.
        calls: Calls that it made.
    """

    code: int | None
    out: str
    err: str
    calls: Sequence[Call]


def can_watch() -> bool:
    """Whether this system has what is needed."""
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    return bool(_NUMBERS) and actions.exists() and "user_notif" in actions.read_text()


def run_watched(function: Callable[[], int], folder: Path, fault: Fault | None = None) -> Ended:
    """Run a function in a forked child in a folder, where its calls are counted and the fault happens.

    Args:
        function: Function, whose result is the exit code.
        folder: Working directory of the child; only what is below it counts.
        fault: What happens, and when; None for nothing.
    """
    ours, theirs = socket.socketpair()
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err, ours, theirs:
        child = os.fork()
        if child == 0:
            _be_watched(function, folder, theirs, out, err)
        theirs.close()
        (listener,) = socket.recv_fds(ours, 1, 1)[1]
        try:
            calls = _watch(listener, child, folder.resolve(), fault)
        finally:
            os.close(listener)
        _, status = os.waitpid(child, 0)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    return Ended(code, texts[0], texts[1], calls)


def _be_watched(function: Callable[[], int], folder: Path, control: socket.socket, out: IO[str], err: IO[str]) -> None:
    """The child's life."""
    code = 70
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder)
        listener = _install_filter()
        socket.send_fds(control, [b"."], [listener])
        os.close(listener)
        code = function()
    except BaseException:  # noqa: BLE001 - nothing of the parent's may go on in the child
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("true", ctypes.c_ubyte), ("false", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_NO_NEW_PRIVILEGES, _SET_FILTER, _NEW_LISTENER = 38, 1, 8


def _install_filter() -> int:
    """Have the kernel ask before every call of `_NAMES`; the descriptor that it asks at."""
    found: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, 0)]
    for number, name in _NAMES.items():
        if name in ("open", "openat"):
            flags = 16 + 8 * (1 if name == "open" else 2)  # offset of that argument in struct seccomp_data
            found += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, flags), (_ANY_BIT, 0, 1, _WRITES)]
            found += [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
        else:
            found += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _NOTIFY)]
    found.append((_RETURN, 0, 0, _ALLOW))
    instructions = (_Instruction * len(found))(*found)
    system = ctypes.CDLL(None, use_errno=True)
    system.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    program = _Program(len(found), instructions)
    listener = system.syscall(_NUMBERS["seccomp"], _SET_FILTER, _NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


_QUESTION, _ANSWER = struct.Struct("=QII iI Q 6Q"), struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_GO_ON = 1


def _watch(listener: int, child: int, folder: Path, fault: Fault | None) -> list[Call]:
    """Decide on the calls of a process and its descendants until they end."""
    calls: list[Call] = []
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        ((_, events),) = poll.poll()
        if not events & select.POLLIN:
            return calls
        question = bytearray(_QUESTION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, question)
        except (FileNotFoundError, InterruptedError):  # it was killed while it asked
            continue
        identifier, process, _, number, _, _, *arguments = _QUESTION.unpack(question)
        error, flags = 0, _GO_ON
        try:
            call = _described(_NAMES[number], process, arguments, folder)
        except (FileNotFoundError, ProcessLookupError):  # the same, since
            continue
        if call is not None:
            if fault is not None and fault.hits(len(calls), call):
                if fault.error == KILL:
                    _write_half(call, process, arguments)
                    os.kill(child, signal.SIGKILL)
                    calls.append(call)
                    continue
                error, flags = -fault.error, 0
            elif call.name in SYNCS:
                flags = 0
            calls.append(call)
        try:
            fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(identifier, 0, error, flags)))
        except FileNotFoundError:
            continue


def _described(name: str, process: int, arguments: Sequence[int], folder: Path) -> Call | None:
    """A call; None if it is about nothing below the folder."""
    source = ""
    if name in _DESCRIPTOR_AT:
        link = Path(f"/proc/{process}/fd/{arguments[_DESCRIPTOR_AT[name]]}")
        if not link.is_file() and not link.is_dir():
            return None
        path = str(link.readlink())
    elif name in _PATH_AT:
        at = _PATH_AT[name]
        path = _path(process, arguments, at, has_folder=name.endswith(("at", "at2")))
        if not name.startswith("symlink"):
            source = _path(process, arguments, 1 if name.endswith(("at", "at2")) else 0, has_folder="at" in name)
    else:
        has_folder = name.endswith("at")
        path = _path(process, arguments, 1 if has_folder else 0, has_folder=has_folder)
    inside = f"{folder}/"
    if not path.startswith(inside):
        return None
    return Call(name, path.removeprefix(inside), source.removeprefix(inside))


def _path(process: int, arguments: Sequence[int], at: int, *, has_folder: bool) -> str:
    """Absolute path that an argument points to, relative to the folder that the argument before it has open."""
    text = os.fsdecode(_memory(process, arguments[at], 4096).partition(b"\0")[0])
    opened = ctypes.c_int(arguments[at - 1] & 0xFFFFFFFF).value if has_folder else -100
    base = f"/proc/{process}/cwd" if opened == -100 else f"/proc/{process}/fd/{opened}"
    return os.path.normpath(Path(base).readlink() / text)


def _memory(process: int, address: int, count: int) -> bytes:
    """At most `count` bytes of the memory of a process."""
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(count)


def _write_half(call: Call, process: int, arguments: Sequence[int]) -> None:
    """Do the first half of a plain write in the place of a process that won't."""
    if call.name not in ("write", "pwrite64"):
        return
    descriptor, address, count, *rest = arguments
    half = _memory(process, address, count // 2)
    facts: dict[str, Any] = dict(
        line.split(":\t") for line in Path(f"/proc/{process}/fdinfo/{descriptor}").read_text().splitlines()[:2]
    )
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_WRONLY)
    try:
        appends = int(facts["flags"], 8) & os.O_APPEND
        place = os.fstat(opened).st_size if appends else rest[0] if call.name == "pwrite64" else int(facts["pos"])
        os.pwrite(opened, half, place)
    finally:
        os.close(opened)
