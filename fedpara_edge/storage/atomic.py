"""Atomic writing of files and folders: each is either complete under its name or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedpara_edge.errors import FedparaError, InputError, OutputExistsError


def check_output(path: Path, *, overwrite: bool, folder: bool = False) -> None:
    """Refuse an output that can't or must not be written, before any work is done for it.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        InputError: `path` is of another kind (a folder where a file is to be written, a device), or the folder it is in
            does not exist or can't be written.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{path}: expected an existing folder {parent}, found none; create it first")
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        raise InputError(
            f"{path}: expected {'a folder' if folder else 'a file'}, found another kind; choose another name"
        )
    if path.exists() and not overwrite:
        raise OutputExistsError(
            f"{path}: expected a new output, found an existing one; choose another name or pass --overwrite"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: expected a folder that can be written, found {parent}; choose another place")


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    On any error, Ctrl-C included, the temporary file is removed and `path` stays as it was.

    Raises:
        FedparaError: The disk is full or refuses the write.
    """
    path = path.absolute()
    with _explaining_os_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed to `path`, replacing what was there.

    On any error, Ctrl-C included, the temporary folder is removed and `path` stays as it was.

    Raises:
        FedparaError: The disk is full or refuses the write.
    """
    path = path.absolute()
    with _explaining_os_errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        retired = temporary.with_name(f"{temporary.name}.old")
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                path.rename(retired)
            temporary.rename(path)
        except BaseException:
            if retired.exists() and not path.exists():
                retired.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(retired, ignore_errors=True)
        _sync(path.parent)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces.

    Raises:
        InputError: The file can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, found {error.strerror}; check the path") from error


@contextmanager
def _explaining_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FedparaError(
            f"{path}: expected to write it, found {error.strerror or error}; "
            "nothing was written: free space or choose another place"
        ) from error


def _sync(path: Path) -> None:
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
