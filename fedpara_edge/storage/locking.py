"""Locks on folders that one process may change at a time, held by the process itself and so gone when it ends.

A lock is one on an empty file in the folder (`flock`). Windows has none, so folders are not protected there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedpara_edge.errors import BusyError, InputError
from fedpara_edge.storage.wholefile import check_regular

if sys.platform != "win32":
    import fcntl

_RETRY_SECONDS = 0.02


@contextmanager
def hold(file: Path, *, folder: Path, kind: str, alone: bool = True, patience_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder for as long as the context lasts, with all others who don't ask to be alone.

    Args:
        file: File of the lock, made if it is missing.
        folder: Folder that it protects, for the message of an error.
        kind: Kind of the folder with its article, likewise.
        alone: Whether nobody else may hold it at first.
        patience_seconds: Time in seconds that others get to end.

    Raises:
        BusyError: Another process holds it.
        InputError: The file can't be made or locked.
    """
    try:
        if file.exists():
            check_regular(file)  # opening a pipe would wait for its reader
        opened = file.open("a")
    except OSError as error:
        raise InputError(f"{folder}: expected {kind} to write in, found {error.strerror}; choose another") from error
    with opened:
        deadline = time.monotonic() + patience_seconds
        try:
            while alone and not try_lock(opened):
                if time.monotonic() > deadline:
                    raise BusyError(
                        f"{folder}: expected {kind} that no other process uses, found it in use; wait for that process "
                        "or choose another folder"
                    )
                time.sleep(_RETRY_SECONDS)
            if sys.platform != "win32":
                fcntl.flock(opened, fcntl.LOCK_SH)
        except OSError as error:
            raise InputError(
                f"{folder}: expected a folder that can be locked, found {error.strerror}; choose one on a local disk"
            ) from error
        yield


@contextmanager
def hold_folder(folder: Path, *, kind: str, lock: str = ".lock", parents: bool = True) -> Iterator[None]:
    """Make a folder if it is missing, and hold its lock for as long as the context lasts.

    Args:
        folder: Folder.
        kind: Kind of the folder with its article, for messages.
        lock: Name of the lock's file in it.
        parents: Whether the folders above it are made too.

    Raises:
        BusyError: Another process holds it.
        InputError: The folder can't be made or locked.
    """
    make_folder(folder, kind=kind, parents=parents)
    with hold(folder / lock, folder=folder, kind=kind):
        yield


def make_folder(folder: Path, *, kind: str, parents: bool = True) -> None:
    """Make a folder unless it is there.

    Args:
        folder: Folder.
        kind: Kind of the folder with its article, for the message of an error.
        parents: Whether the folders above it are made too.

    Raises:
        InputError: It can't be made, or something else has its name.
    """
    try:
        folder.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: expected {kind} to write in, found {error.strerror}; choose another") from error


def try_lock(file: IO[str]) -> bool:
    """Lock an open file unless another process has; whether it did.

    Raises:
        OSError: The file is on a disk without locks.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
