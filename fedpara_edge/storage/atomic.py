"""Atomic writing of files and folders: each is either complete under its name or not there at all."""

from __future__ import annotations

import ctypes
import filecmp
import glob
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from fedpara_edge.errors import FedparaError, InputError, OutputExistsError
from fedpara_edge.storage.locking import try_lock
from fedpara_edge.storage.wholefile import check_regular


def check_output(path: Path, *, overwrite: bool, folder: bool = False, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse an output that can't or must not be written, before any work is done for it, and tidy up beside it.

    Args:
        path: Output.
        overwrite: Whether it may exist.
        folder: Whether it is a folder.
        inputs: Files and folders that it is made from, none of which it may replace.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        InputError: `path` is of another kind (a folder where a file is to be written, a device) or one of the inputs,
            or the folder it is in does not exist or can't be written.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{path}: expected an existing folder {parent}, found none; create it first")
    remove_leftovers(path)
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        raise InputError(
            f"{path}: expected {'a folder' if folder else 'a file'}, found another kind; choose another name"
        )
    for source in inputs:
        if source is not None and path.exists() and source.exists() and path.samefile(source):
            raise InputError(f"{path}: expected an output beside its inputs, found one of them; choose another name")
    if path.exists() and not overwrite:
        raise _exists(path)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: expected a folder that can be written, found {parent}; choose another place")


Ready = Callable[[Path, Path], None]
"""Function of a complete and synced file, the first path, which is about to be renamed to the second."""


@contextmanager
def replacing_file(
    path: Path, *, overwrite: bool = True, mode: int = 0o666, ready: Ready | None = None
) -> Iterator[Path]:
    """Yield a temporary path; on success it is synced to disk and renamed to `path`.

    On any error, Ctrl-C included, the temporary file is removed and `path` stays as it was. What a process that was
    killed left behind is removed by the next one that writes to `path`.

    Args:
        path: File to write.
        overwrite: Whether to replace an existing file that has other content; one with the same content stays.
        mode: Permissions of the file, of which the umask is taken away.
        ready: Function called just before the rename, which an error of its own prevents.

    Raises:
        OutputExistsError: `path` exists with other content, and `overwrite` is false.
        FedparaError: The disk is full or refuses the write.
    """
    path = path.absolute()
    with _explaining_os_errors(path), _beside(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        yield temporary
        sync(temporary)
        temporary.chmod(mode & ~_umask())
        if is_there := not overwrite and path.exists():
            _check_same(temporary, path)
        if ready is not None:
            ready(temporary, path)
        if is_there:
            return
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it is synced and renamed to `path`, in exchange for what was there.

    On any error, Ctrl-C included, the temporary folder is removed and `path` stays as it was. Killed at any moment, a
    process leaves the old folder or the new one at `path` where the system can exchange two names (Linux); elsewhere
    the old one may lie beside it, from where the next call brings it back.

    Raises:
        FedparaError: The disk is full or refuses the write.
    """
    path = path.absolute()
    with _explaining_os_errors(path), _beside(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            _replace_folder(temporary, path)
        else:
            temporary.rename(path)
        sync(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote to `path` left beside it, as the next write does too.

    A folder that was being replaced, and is gone, is brought back.
    """
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(OSError), (folder / _LOCK).open("r+") as lock:
            if try_lock(lock):
                if (folder / _RETIRED).exists() and not path.exists():
                    (folder / _RETIRED).rename(path)
                _remove(folder)
        if _MADE.fullmatch(folder.suffix):  # killed before the lock was there, or when it was gone
            with suppress(OSError):
                folder.rmdir()


def remove_leftovers_in(folder: Path) -> None:
    """Remove all that processes that were killed left behind in a folder and those below it."""
    for made in list(folder.rglob(".*")):
        if _MADE.fullmatch(made.suffix) and made.is_dir():
            remove_leftovers(made.with_name(made.stem[1:]))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, in which all that comes before the rename is made.

    It is locked while it is in use, so that what others left of theirs is told from what they still write.
    """
    remove_leftovers(path)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            try:
                lock = (folder / _LOCK).open("a")
            except FileNotFoundError:  # another process took it for a leftover
                continue
            with lock:
                if _is_locked(lock) and (folder / _LOCK).exists():
                    yield folder
                    return
        finally:
            _remove(folder)


def _is_locked(lock: IO[str]) -> bool:
    try:
        return try_lock(lock)
    except OSError:  # on a disk without locks, leftovers stay
        return True


def _remove(folder: Path) -> None:
    """Remove a temporary folder as far as possible, the lock last, by which it is known as one."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _replace_folder(new: Path, old: Path) -> None:
    """Put a folder in the place of another, which then is where it was, or beside it."""
    if _exchange(new, old):
        return
    retired = new.with_name(_RETIRED)
    try:
        old.rename(retired)
        new.rename(old)
    except BaseException:
        if retired.exists() and not old.exists():
            retired.rename(old)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, if the system can; whether it did."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


_LOCK, _RETIRED = "fedpara-edge.lock", "retired"
_MADE = re.compile(r"\.[a-z0-9_]{8}")
"""End of the names that `tempfile` makes."""
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def _check_same(new: Path, old: Path) -> None:
    if not filecmp.cmp(new, old, shallow=False):
        raise _exists(old)


def sha256_of(path: Path, *, max_bytes: int | None = None) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces.

    Args:
        path: File.
        max_bytes: Largest size; None for any.

    Raises:
        InputError: The file can't be read, or is larger.
    """
    try:
        check_regular(path, max_bytes=max_bytes)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, found {error.strerror}; check the path") from error


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError(
        f"{path}: expected a new output, found an existing one; choose another name or pass --overwrite"
    )


@contextmanager
def _explaining_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FedparaError(
            f"{path}: expected to write it, found {error.strerror or error}; "
            "nothing was written: free space or choose another place"
        ) from error


_syncing = ContextVar("syncing", default=True)


@contextmanager
def unsynced() -> Iterator[None]:
    """Context in which this thread does not wait for the disk.

    What it writes is complete or not there, whenever it is killed; but a power cut may damage it, so that this is for
    files that are made again after one.
    """
    token = _syncing.set(False)
    try:
        yield
    finally:
        _syncing.reset(token)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk; not if `unsynced`."""
    if not _syncing.get():
        return
    # A folder can't be opened for syncing on every system; the rename is atomic all the same.
    with suppress(PermissionError, IsADirectoryError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
