"""Local data: arrays on disk, the inputs [N, ...] and usually the labels [N, ...], read batch by batch.

They come as one `.npz`, which is read whole, or as a folder with `x.npy` and `y.npy`, which are memory-mapped: of
inputs larger than memory only the rows of a batch are read. The arrays have the names of the bundle's inputs and
labels: x and y, unless it has several.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.protocol import Arrays
from device_runtime.labels import fitted, numbered
from device_runtime.remedies import remedy_for_dtype, remedy_for_shape
from device_runtime.sources import ANY, PLAIN, Reading, Wanted, as_arrays
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import ArraySpec, Head, Interface
from fedpara_edge.losses import Loss
from fedpara_edge.storage.arrayfile import array_names, open_arrays

Batch = tuple[Arrays, Arrays]
"""Inputs and labels of some rows."""
BLOCK_BYTES = 1 << 22
SAMPLED_ROWS = 64


class DataSpec(Protocol):
    """Specification that data must fit: a bundle's manifest, or the description of a folded model."""

    @property
    def interface(self) -> Interface:
        """Inputs and labels of the model."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """Examples on disk or in memory without their labels, of the shapes and dtypes that a model expects.

    Args:
        path: Source of the examples, for messages.
        arrays: Inputs [N, *shape] by name, of their dtypes, or any integers for tokens.
        interface: Interface of the model.
    """

    path: Path
    arrays: Arrays
    interface: Interface

    @property
    def examples(self) -> int:
        """Number of rows N."""
        return len(self.arrays[self.interface.inputs[0].name])

    def inputs(self, rows: NDArray[Any]) -> Arrays:
        """Copies of some rows of the inputs [B, ...], C-ordered in the model's dtypes.

        Args:
            rows: Row numbers, integers [B] in [0, N).

        Raises:
            InputError: A row holds NaN or Inf, or a token out of range.
        """
        return {spec.name: _read(self.path, self.arrays[spec.name], spec, rows) for spec in self.interface.inputs}


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset(Inputs):
    """Examples on disk or in memory, of the shapes and dtypes that a model expects.

    Args:
        arrays: The inputs, and labels [N, *shape] of their dtypes, or any integers for classes.
    """

    def rows(self, rows: NDArray[Any]) -> Batch:
        """Copies of some rows of inputs and labels [B, ...], C-ordered in the bundle's dtypes.

        Args:
            rows: Row numbers, integers [B] in [0, N).

        Raises:
            InputError: A row holds NaN or Inf, or a label or token out of range.
        """
        return self.inputs(rows), self.labels(rows)

    def labels(self, rows: NDArray[Any]) -> Arrays:
        """Copies of the labels of some rows, as `rows` returns them."""
        return {head.label.name: _read_labels(self.path, self.arrays, head, rows) for head in self.interface.heads}

    def slice(self, start: int, end: int) -> Dataset:
        """Dataset of consecutive rows, from `start` to before `end`."""
        return replace(self, arrays={name: array[start:end] for name, array in self.arrays.items()})

    def digest(self) -> str:
        """Hexadecimal SHA-256 of shapes, dtypes and at most 64 evenly spaced rows, to tell datasets apart cheaply."""
        specs = (*self.interface.inputs, *self.interface.labels)
        arrays = [self.arrays[spec.name] for spec in specs]
        found = hashlib.sha256(" ".join(f"{array.shape} {array.dtype}" for array in arrays).encode())
        for row in dict.fromkeys(number * (self.examples - 1) // (SAMPLED_ROWS - 1) for number in range(SAMPLED_ROWS)):
            for array in arrays:
                found.update(array[row].tobytes())
        return found.hexdigest()


def open_data(path: Path | str, spec: DataSpec, reading: Reading = PLAIN) -> Dataset:
    """Open data and check that they fit a model.

    Values in memory and class labels are checked at once, those of other memory-mapped arrays when they are read.

    Args:
        path: File `.npz`, folder of `.npy` files, or a source that is turned into such a folder
            (`device_runtime.sources`).
        spec: Specification of the model's data.
        reading: Options for reading a source.

    Raises:
        InputError: A file is missing, damaged or foreign, or names, shapes, dtypes, row counts or values do not fit.
    """
    path = Path(path)
    return _with_labels(path, _open(path, spec.interface, reading, with_labels=True), spec.interface)


def open_inputs(path: Path, spec: DataSpec, reading: Reading = PLAIN) -> Inputs:
    """Open data as `open_data` does, but with or without labels: a `Dataset` exactly if there are labels.

    Raises:
        InputError: A file is missing, damaged or foreign, or names, shapes, dtypes, row counts or values do not fit.
    """
    interface = spec.interface
    arrays = _open(path, interface, reading, with_labels=False)
    if arrays.keys() >= {label.name for label in interface.labels}:
        return _with_labels(path, arrays, interface)
    inputs = Inputs(path=path, arrays=arrays, interface=interface)
    check_inputs(inputs, values=not path.is_dir())
    return inputs


def _open(path: Path, interface: Interface, reading: Reading, *, with_labels: bool) -> dict[str, NDArray[Any]]:
    """Inputs and labels by name; labels may be missing unless `with_labels` is set."""
    one = interface.inputs[0] if len(interface.inputs) == 1 else None
    place = as_arrays(path, reading, ANY if one is None else Wanted(one.shape, one.dtype))
    inputs, labels = ([spec.name for spec in specs] for specs in (interface.inputs, interface.labels))
    needed = inputs + labels if with_labels else inputs
    if place != path:
        _check_made(path, array_names(place), needed)
    arrays = open_arrays(place, needed, optional=labels)
    names = open_arrays(place, (), optional=[f"{name}_names" for name in labels])
    for label in interface.labels:
        if label.name in arrays:
            arrays[label.name] = numbered(path, arrays[label.name], names.get(f"{label.name}_names"), label)
    if place == path:
        return arrays
    return fitted(arrays, {spec.name: spec for spec in (*interface.inputs, *interface.labels)})


def _check_made(path: Path, made: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a source from which an array that a model needs was not made, by the name that the user gave it."""
    missing = [name for name in needed if name not in made]
    if not missing:
        return
    if path.is_dir():
        raise InputError(
            f"{path}: expected what makes {_listed(missing)}, found what makes {_listed(made)}; labels are the "
            "names of folders, one for each class, and a model of several inputs takes arrays"
        )
    columns = [name for name in made if name not in ("x", "y", "y_names")]
    if missing == ["y"]:
        raise InputError(
            f"{path}: expected a column with the label, found {_listed(columns)}; name it", key="label_column"
        )
    raise InputError(f"{path}: expected columns {_listed(missing)}, found {_listed(columns)}; rename them")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def check_inputs(data: Inputs, *, values: bool = True) -> None:
    """Check shapes, dtypes and number of the inputs, and every value if `values` is set.

    Raises:
        InputError: The inputs do not fit, or there are none.
    """
    for spec in data.interface.inputs:
        _check_shape(data.path, data.arrays[spec.name], spec, of_input=True)
        _check_dtype(data.path, data.arrays[spec.name], spec, of_input=True)
    if not data.examples:
        raise InputError(f"{data.path}: expected at least one row, found none; add examples")
    _check_rows(data.path, data.arrays)
    if values:
        for rows in _blocks(data.arrays.values()):
            data.inputs(rows)


def _with_labels(path: Path, arrays: Arrays, interface: Interface) -> Dataset:
    dataset = Dataset(path=path, arrays=arrays, interface=interface)
    for label in interface.labels:
        _check_shape(path, arrays[label.name], label, of_input=False)
        _check_dtype(path, arrays[label.name], label, of_input=False)
    check_inputs(dataset, values=not path.is_dir())
    for head in interface.heads:
        labels = arrays[head.label.name]
        if not path.is_dir() or head.label.classes is not None:
            _check_first_class(path, labels, head.label)
            for rows in _blocks([labels]):
                _read_labels(path, arrays, head, rows)
    return dataset


def _check_rows(path: Path, arrays: Arrays) -> None:
    """Check that all arrays have as many rows."""
    (first, array), *others = arrays.items()
    for name, other in others:
        if len(array) != len(other):
            raise InputError(
                f"{path}: expected as many rows in {first!r} as in {name!r}, found {len(array)} and {len(other)}; "
                "save inputs and labels together"
            )


def _read_labels(path: Path, arrays: Arrays, head: Head, rows: NDArray[Any]) -> NDArray[Any]:
    return _read(path, arrays[head.label.name], head.label, rows, loss=head.loss)


def _read(
    path: Path, array: NDArray[Any], spec: ArraySpec, rows: NDArray[Any], *, loss: Loss | None = None
) -> NDArray[Any]:
    values = array[rows]
    if spec.classes is not None:
        expected, good = f"integers in [0, {spec.classes})", (values >= 0) & (values < spec.classes)
        if loss is not None and loss.ignored is not None:
            expected, good = f"{expected} or {loss.ignored}", good | (values == loss.ignored)
    elif loss is not None and loss.labels == "probabilities":
        expected, good = "numbers in [0, 1]", (values >= 0) & (values <= 1)
    else:
        expected, good = "finite numbers", np.isfinite(values)
    if not good.all():
        where = np.unravel_index(int(np.argmin(good)), good.shape)
        raise InputError(
            f"{path}: array {spec.name!r}, row {rows[where[0]]}: expected {expected}, found {values[where]}; "
            "correct or remove this row"
        )
    return np.ascontiguousarray(values, dtype=spec.dtype)


def _check_shape(path: Path, array: NDArray[Any], spec: ArraySpec, *, of_input: bool) -> None:
    if array.ndim == 0 or array.shape[1:] != spec.shape:
        raise InputError(
            f"{path}: array {spec.name!r}: expected shape [{', '.join(('N', *map(str, spec.shape)))}], "
            f"found {list(array.shape)}; {remedy_for_shape(array, spec, of_input=of_input)}"
        )


def _check_dtype(path: Path, array: NDArray[Any], spec: ArraySpec, *, of_input: bool) -> None:
    found, classes = array.dtype.name, spec.classes is not None
    if not (array.dtype.kind in "iu" if classes else found == spec.dtype):
        found = "text" if array.dtype.kind in "US" else found
        remedy = remedy_for_dtype(array, spec, of_input=of_input)
        expected = "integers" if classes else spec.dtype
        raise InputError(f"{path}: array {spec.name!r}: expected {expected}, found {found}; {remedy}")


def _check_first_class(path: Path, y: NDArray[Any], label: ArraySpec) -> None:
    """Refuse labels 1 to C of C classes, which begin at 0."""
    if label.classes is None or not y.size or (y.min(), y.max()) != (1, label.classes):
        return
    if np.array_equal(np.unique(y), np.arange(1, label.classes + 1)):
        raise InputError(
            f"{path}: array {label.name!r}: expected labels from 0 to {label.classes - 1}, found labels from 1 to "
            f"{label.classes}; subtract 1 from all of them"
        )


def _blocks(arrays: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    arrays = list(arrays)
    count = len(arrays[0])
    size = max(1, BLOCK_BYTES * count // max(1, sum(array.nbytes for array in arrays)))
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))
