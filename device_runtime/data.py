"""Local data: two arrays on disk, the inputs x [N, ...] and the labels y [N, ...], read batch by batch.

They come as one `.npz`, read whole, or as a folder with `x.npy` and `y.npy`, which are memory-mapped: of inputs larger
than memory only the rows of a batch are read. The arrays carry the names of the bundle's input and label.
"""

from __future__ import annotations

import hashlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.bundle import ArraySpec, Loss, Manifest
from fedpara_edge.errors import InputError

Batch = tuple[NDArray[Any], NDArray[Any]]
BLOCK_BYTES = 1 << 22
SAMPLED_ROWS = 64
# What numpy and zipfile raise on damaged files, as seen by flipping bytes.
DAMAGED = (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples on disk or in memory, of the shapes and dtypes that a bundle expects.

    Args:
        path: where they come from, for messages.
        x: inputs [N, *input.shape], of dtype `input.dtype`, or any integers for tokens.
        y: labels [N, *label.shape], of dtype `label.dtype`, or any integers for classes.
        input: the bundle's input; tokens if it has `classes`.
        label: the bundle's label.
        loss: the bundle's loss; `bce` wants labels in [0, 1].
    """

    path: Path
    x: NDArray[Any]
    y: NDArray[Any]
    input: ArraySpec
    label: ArraySpec
    loss: Loss

    @property
    def examples(self) -> int:
        """Number of rows N."""
        return len(self.x)

    def rows(self, rows: NDArray[Any]) -> Batch:
        """Copies of some rows, x [B, *input.shape] and y [B, *label.shape], C-ordered in the bundle's dtypes.

        Args:
            rows: integers [B] in [0, N).

        Raises:
            InputError: one of them holds NaN or Inf, or a label or token out of its range.
        """
        return self.inputs(rows), self.labels(rows)

    def inputs(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The inputs of some rows, as in `rows`."""
        return self._read(self.x, self.input, rows)

    def labels(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The labels of some rows, as in `rows`."""
        return self._read(self.y, self.label, rows)

    def digest(self) -> str:
        """Hexadecimal SHA-256 of shapes, dtypes and at most 64 evenly spaced rows: tells datasets apart, cheaply."""
        found = hashlib.sha256(f"{self.x.shape} {self.x.dtype} {self.y.shape} {self.y.dtype}".encode())
        for row in np.unique(np.arange(SAMPLED_ROWS) * (self.examples - 1) // (SAMPLED_ROWS - 1)):
            found.update(self.x[row].tobytes())
            found.update(self.y[row].tobytes())
        return found.hexdigest()

    def _read(self, array: NDArray[Any], spec: ArraySpec, rows: NDArray[Any]) -> NDArray[Any]:
        values = array[rows]
        if spec.classes is not None:
            expected, good = f"integers in [0, {spec.classes})", (values >= 0) & (values < spec.classes)
        elif self.loss == "bce" and spec is self.label:
            expected, good = "numbers in [0, 1]", (values >= 0) & (values <= 1)
        else:
            expected, good = "finite numbers", np.isfinite(values)
        if not good.all():
            where = np.unravel_index(int(np.argmin(good)), good.shape)
            raise InputError(
                f"{self.path}: array {spec.name!r}, row {rows[where[0]]}: expected {expected}, found {values[where]}; "
                "correct or remove this row"
            )
        return np.ascontiguousarray(values, dtype=spec.dtype)


def open_data(path: Path, manifest: Manifest) -> Dataset:
    """Open an `.npz` or a folder of `.npy` files and check that it fits a bundle.

    Values are checked at once where they are in memory or class labels; those of other memory-mapped arrays when read.

    Args:
        path: the `.npz`, or the folder.
        manifest: of the bundle.

    Raises:
        InputError: missing, damaged or foreign files, or names, shapes, dtypes, row counts or values that do not fit.
    """
    names = (manifest.input.name, manifest.label.name)
    mapped = path.is_dir()
    x, y = _map_folder(path, names) if mapped else _load_npz(path, names)
    _check_shape(path, x, manifest.input)
    _check_shape(path, y, manifest.label)
    _check_dtype(path, x, manifest.input, of_input=True)
    _check_dtype(path, y, manifest.label, of_input=False)
    if len(x) != len(y):
        raise InputError(
            f"{path}: expected as many rows in {names[0]!r} as in {names[1]!r}, found {len(x)} and {len(y)}; "
            "save inputs and labels together"
        )
    if not len(x):
        raise InputError(f"{path}: expected at least one row, found none; add examples")
    dataset = Dataset(path, x, y, manifest.input, manifest.label, manifest.loss)
    if not mapped:
        for rows in _blocks(x):
            dataset.inputs(rows)
    if not mapped or manifest.label.classes is not None:
        for rows in _blocks(y):
            dataset.labels(rows)
    return dataset


def _map_folder(path: Path, names: tuple[str, str]) -> tuple[NDArray[Any], NDArray[Any]]:
    _check_names(path, {file.stem for file in path.glob("*.npy") if file.is_file()}, names)
    arrays = []
    for file in (path / f"{name}.npy" for name in names):
        with _explaining(file):
            arrays.append(np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)))
    return arrays[0], arrays[1]


def _load_npz(path: Path, names: tuple[str, str]) -> tuple[NDArray[Any], NDArray[Any]]:
    if not path.is_file():
        found = "a pipe or device" if path.exists() else "nothing"
        raise InputError(f"{path}: expected an .npz file or a folder with .npy files, found {found}; check the path")
    if path.suffix != ".npz" and not zipfile.is_zipfile(path):
        raise InputError(
            f"{path}: expected an .npz file or a folder with .npy files, found another file; "
            f"save it with numpy.savez(path, {names[0]}=…, {names[1]}=…)"
        )
    with _explaining(path), path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
        _check_names(path, set(archive.files), names)
        arrays = [archive[name] for name in names]
        for name, array in zip(names, arrays, strict=True):
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} is no .npy file")
    return arrays[0], arrays[1]


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


def _check_names(path: Path, found: set[str], names: tuple[str, str]) -> None:
    if not found.issuperset(names):
        listed = ", ".join(repr(name) for name in sorted(found)) or "none"
        raise InputError(
            f"{path}: expected arrays named {names[0]!r} and {names[1]!r}, found {listed}; save them under these names"
        )


def _check_shape(path: Path, array: NDArray[Any], spec: ArraySpec) -> None:
    if array.ndim == 0 or array.shape[1:] != spec.shape:
        raise InputError(
            f"{path}: array {spec.name!r}: expected shape [{', '.join(('N', *map(str, spec.shape)))}], "
            f"found {list(array.shape)}; reshape it to what the bundle was exported with"
        )


def _check_dtype(path: Path, array: NDArray[Any], spec: ArraySpec, *, of_input: bool) -> None:
    found, classes = array.dtype.name, spec.classes is not None
    if not (array.dtype.kind in "iu" if classes else found == spec.dtype):
        remedy = f"convert it with .astype(numpy.{spec.dtype})"
        if of_input and {found, spec.dtype} == {"uint8", "float32"}:
            remedy = f"export the bundle again with --input-dtype {found}"
        expected = "integers" if classes else spec.dtype
        raise InputError(f"{path}: array {spec.name!r}: expected {expected}, found {found}; {remedy}")


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    size = max(1, BLOCK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), size):
        yield np.arange(start, min(start + size, len(array)))
