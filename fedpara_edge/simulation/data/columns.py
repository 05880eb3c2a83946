"""The arrays of one data file that are dealt out together: inputs, labels, and the owner or group of each row.

Inputs become what bundles take: images uint8 [N, H, W] get a channel axis, [N, 1, H, W], and floating numbers become
float32. Three axes of another type are sequences, [N, steps, channels], and stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.labels import named
from device_runtime.sources import PLAIN, Reading, as_arrays
from fedpara_edge.errors import InputError
from fedpara_edge.storage.arrayfile import open_arrays

Keys = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs x [N, ...] and labels y [N, ...] in memory.

    Args:
        further: Further arrays [N, ...] by name.
        names: Names that x and y have in files.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    further: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    names: tuple[str, str] = ("x", "y")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by their names in files."""
        return {self.names[0]: self.x, **self.further, self.names[1]: self.y}


@dataclass(frozen=True, eq=False, kw_only=True)
class Columns:
    """Inputs x [N, ...] and labels y [N, ...] as they are in the file, on disk where it is a folder.

    Args:
        path: The file or folder.
        names: Names of the two arrays, for messages.
        classes_by_name: Names of the classes in the order of their numbers, strings [C]; None if they have none.
        further: Further arrays [N, ...] by name.
    """

    path: Path
    names: tuple[str, str]
    x: NDArray[Any]
    y: NDArray[Any]
    classes_by_name: NDArray[Any] | None = None
    further: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: NDArray[np.intp]) -> Examples:
        """Copies of some rows.

        Args:
            rows: Numbers of the rows, integers in [0, N).

        Raises:
            InputError: A row holds NaN or Inf.
        """
        x, y = self._finite(self.names[0], self.x[rows], rows), self._finite(self.names[1], self.y[rows], rows)
        if self.further:
            further = {name: self._finite(name, array[rows], rows) for name, array in self.further.items()}
            return Examples(x, y, further, self.names)
        if x.ndim == 3 and x.dtype == np.uint8:
            x = x[:, None]
        return Examples(x, y)

    def classes(self, purpose: str) -> NDArray[np.integer]:
        """The labels as one class for each example, int [N].

        Args:
            purpose: Purpose of the classes, for messages.

        Raises:
            InputError: The labels are of another shape or type.
        """
        if self.y.ndim != 1 or self.y.dtype.kind not in "iu":
            raise InputError(
                f"{self.path}: array {self.names[1]!r}: expected one integer for each example for {purpose}, found "
                f"{self.y.dtype} {list(self.y.shape)}; take the split iid or key"
            )
        return self.y

    def _finite(self, name: str, values: NDArray[Any], rows: NDArray[np.intp]) -> NDArray[Any]:
        if values.dtype.kind != "f":
            return values
        with np.errstate(over="ignore"):
            numbers = values.astype(np.float32, copy=False)
        bad = ~np.isfinite(numbers)
        if bad.any():
            row = rows[np.argwhere(bad)[0][0]]
            raise InputError(
                f"{self.path}: array {name!r}, row {row}: expected numbers finite in float32, found "
                f"{values[bad][0]}; correct or remove this row"
            )
        return numbers


def open_columns(
    path: Path, names: tuple[str, str], *, option: str, further: Sequence[str] = (), reading: Reading = PLAIN
) -> Columns:
    """Open inputs and labels; labels that are text get numbers, in the order of their names.

    Args:
        path: An `.npz`, a folder of `.npy` files, or a source (`device_runtime.sources`).
        names: Names of the two arrays.
        option: Key of the plan that names them, for messages.
        further: Names of further arrays.
        reading: Options for reading a source.

    Raises:
        InputError: A file or array is missing or damaged, is of no numbers, has no rows, or not as many as the other.
    """
    arrays = _open(path, (*names, *further), option, reading)
    x, (y, classes) = arrays[names[0]], named(arrays[names[1]])
    if classes is None:
        classes = _open(path, (), option, reading, optional=[f"{names[1]}_names"]).get(f"{names[1]}_names")
    others = {name: arrays[name] for name in further}
    for name, array in {names[0]: x, names[1]: y, **others}.items():
        if array.ndim == 0 or array.dtype.kind not in ("iufb" if name in others else "iuf"):
            raise InputError(
                f"{path}: array {name!r}: expected numbers, one row for each example, found {array.dtype} "
                f"{list(array.shape)}; save it as integers or floating numbers"
            )
    if not len(x):
        raise InputError(f"{path}: array {names[0]!r}: expected at least one row, found none; add examples")
    for name, array in {names[1]: y, **others}.items():
        _check_length(path, name, array, names[0], len(x))
    return Columns(path=path, names=names, x=x, y=y, classes_by_name=classes, further=others)


def open_keys(path: Path, name: str, *, option: str, of: Columns, reading: Reading = PLAIN) -> Keys:
    """Open the array with the owner or group of each row, integers or strings [N].

    Args:
        path: An `.npz`, a folder of `.npy` files, or a source.
        name: Name of the array.
        option: Key of the plan that names it, for messages.
        of: Examples that it is about.
        reading: Options for reading a source.

    Raises:
        InputError: The array is missing, or does not fit.
    """
    keys = _open(path, (name,), option, reading)[name]
    if keys.ndim != 1 or keys.dtype.kind not in "iuUS":
        raise InputError(
            f"{path}: array {name!r}: expected an integer or a string for each example, found {keys.dtype} "
            f"{list(keys.shape)}; name another array in {option}"
        )
    _check_length(path, name, keys, of.names[0], len(of))
    return np.asarray(keys)


def _open(
    path: Path, names: Sequence[str], option: str, reading: Reading, *, optional: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    place = as_arrays(path, reading)
    try:
        return open_arrays(place, names, optional=optional)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _check_length(path: Path, name: str, array: NDArray[Any], other: str, expected: int) -> None:
    if len(array) != expected:
        raise InputError(
            f"{path}: array {name!r}: expected as many rows as in {other!r}, {expected}, found {len(array)}; "
            "save them together"
        )
