"""Arrays by name in one `.npz`, which is read whole, or in a folder of `.npy` files, which are memory-mapped."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.storage.filekind import HEAD_BYTES, recognize

# Errors that numpy and zipfile raise on damaged files, as found by flipping bytes.
DAMAGED = (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)


def open_arrays(path: Path, names: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Arrays by name from an `.npz`, loaded, or from a folder of `.npy` files, memory-mapped.

    Args:
        path: File `.npz`, or folder of `.npy` files.
        names: Names of the arrays that must be there.
        optional: Names of arrays to read where they are there.

    Raises:
        InputError: A file is missing, damaged or foreign, or an array is missing.
    """
    return _map_folder(path, names, optional) if path.is_dir() else _load_npz(path, names, optional)


def array_names(path: Path) -> list[str]:
    """Names of all arrays in an `.npz` or a folder of `.npy` files.

    Raises:
        InputError: The file is missing, damaged or foreign.
    """
    if path.is_dir():
        return sorted(file.stem for file in path.glob("*.npy") if file.is_file())
    with _archive(path) as archive:
        return sorted(archive.files)


def _map_folder(path: Path, names: Sequence[str], optional: Sequence[str]) -> dict[str, NDArray[Any]]:
    wanted = _wanted(path, {file.stem for file in path.glob("*.npy") if file.is_file()}, names, optional)
    arrays = {}
    for name in wanted:
        with _explaining(path / f"{name}.npy"):
            arrays[name] = np.asarray(np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False))
    return arrays


def _load_npz(path: Path, names: Sequence[str], optional: Sequence[str]) -> dict[str, NDArray[Any]]:
    with _archive(path, names) as archive:
        arrays = {name: archive[name] for name in _wanted(path, set(archive.files), names, optional)}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} is not a .npy file")
    return arrays


@contextmanager
def _archive(path: Path, names: Sequence[str] = ("x", "y")) -> Iterator[Any]:
    """Opened `.npz`; `names` are those of the arrays that it should have."""
    if not path.is_file():
        found = "a pipe or device" if path.exists() else "nothing"
        raise InputError(f"{path}: expected an .npz file or a folder with .npy files, found {found}; check the path")
    if path.suffix != ".npz" and not zipfile.is_zipfile(path):
        with _explaining(path), path.open("rb") as file:
            found = recognize(file.read(HEAD_BYTES), path.suffix) or "another file"
        raise InputError(
            f"{path}: expected an .npz file or a folder with .npy files, found {found}; "
            f"save it with numpy.savez(path, {', '.join(f'{name}=…' for name in names)})"
        )
    with _explaining(path), path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
        yield archive


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise InputError(
            f"{path}: expected arrays that fit in memory, found larger ones; save them as .npy files in a folder"
        ) from error
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: expected whole numpy arrays of numbers, found damaged or foreign ones ({reason}); "
            "save them again with numpy, not as objects"
        ) from error


def _wanted(path: Path, found: set[str], names: Sequence[str], optional: Sequence[str]) -> tuple[str, ...]:
    """Names of the arrays to read."""
    if not found.issuperset(names):
        listed = ", ".join(repr(name) for name in sorted(found)) or "none"
        *first, last = (repr(name) for name in names)
        expected = " and ".join([", ".join(first), last] if first else [last])
        raise InputError(f"{path}: expected arrays named {expected}, found {listed}; save them under these names")
    return (*names, *(name for name in optional if name in found and name not in names))
