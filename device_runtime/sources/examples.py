"""Examples from the columns of a table: rows, or windows of consecutive rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.sources.reading import Reading, Wanted
from device_runtime.sources.tables import Columns, numbers
from fedpara_edge.errors import InputError

OWN = frozenset({"x", "y", "y_names"})
"""Names that the arrays of the examples have."""


def examples_of(path: Path, columns: Columns, reading: Reading, wanted: Wanted) -> dict[str, NDArray[Any]]:
    """Arrays of examples: x, y if there is a label, `y_names` if it is text, and every column by its own name.

    Inputs are float32, or int64 where the model wants integers, [N, columns] or, with windows, [N, window, columns],
    or [N, columns, window] if the model wants that. A window has the label that most of its rows have, the first of
    equally many, or the mean of numbers, and of other columns what its first row has.

    Args:
        path: Source, for messages.
        columns: Columns of the table.
        reading: Options for reading them.
        wanted: Shape and dtype that a model expects of its input.

    Raises:
        InputError: A column is missing or does not hold what it must, or no window is whole.
    """
    labels = _labels(path, columns, reading)
    features = reading.column or tuple(
        name
        for name, column in columns.items()
        if column.dtype.kind != "U" and name not in (*labels, reading.window_key)
    )
    for name in (*features, *([reading.window_key] if reading.window_key else [])):
        _check_known(path, columns, name)
    if not features:
        raise InputError(f"{path}: expected columns with numbers beside the label, found none; add some")
    dtype = np.int64 if wanted.dtype == "int64" else np.float32
    x = np.stack([numbers(path, name, columns[name]).astype(dtype) for name in features], axis=-1)
    arrays: dict[str, NDArray[Any]] = {"x": x}
    names: NDArray[Any] | None = None
    if labels:
        arrays["y"], names = _as_labels(path, columns, labels)
    for name, column in columns.items():
        if name not in OWN and re.fullmatch(r"[\w .-]+", name):
            arrays[name] = column.astype(np.float32) if column.dtype.kind == "f" else column
    if reading.window is not None:
        arrays = _windows(path, arrays, columns, reading)
        if wanted.shape == (len(features), reading.window) and len(features) != reading.window:
            arrays["x"] = np.ascontiguousarray(arrays["x"].transpose(0, 2, 1))
    return arrays if names is None else {**arrays, "y_names": names}


def _labels(path: Path, columns: Columns, reading: Reading) -> tuple[str, ...]:
    """Names of the columns with the label; none where the default one is not there."""
    if reading.label_column == ("label",) and "label" not in columns:
        return ()
    for name in reading.label_column:
        _check_known(path, columns, name)
    return reading.label_column


def _check_known(path: Path, columns: Columns, name: str) -> None:
    if name not in columns:
        raise InputError(f"{path}: expected a column {name!r}, found {', '.join(map(repr, columns))}; name one of them")


def _as_labels(path: Path, columns: Columns, names: tuple[str, ...]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Labels, int64 [N] for classes and float32 for other numbers, and the names of the classes if they are text."""
    if len(names) > 1:
        return np.stack([numbers(path, name, columns[name]).astype(np.float32) for name in names], axis=-1), None
    column = columns[names[0]]
    if column.dtype.kind == "U":
        found, classes = np.unique(column, return_inverse=True)
        return classes.astype(np.int64), found
    column = numbers(path, names[0], column)
    return (column.astype(np.float32), None) if column.dtype.kind == "f" else (column, None)


def _windows(
    path: Path, arrays: dict[str, NDArray[Any]], columns: Columns, reading: Reading
) -> dict[str, NDArray[Any]]:
    assert reading.window is not None
    size, stride = reading.window, reading.stride or reading.window
    rows = len(arrays["x"])
    borders = np.zeros(0, np.intp)
    if reading.window_key is not None:
        key = columns[reading.window_key]
        borders = np.flatnonzero(key[1:] != key[:-1]) + 1
    runs = zip((0, *borders.tolist()), (*borders.tolist(), rows), strict=True)
    starts = np.array([start for first, end in runs for start in range(first, end - size + 1, stride)], np.intp)
    if not len(starts):
        raise InputError(
            f"{path}: expected at least {size} rows for a window, found fewer in a row; shorten the window"
        )
    places = starts[:, None] + np.arange(size)
    windowed = {name: array[starts] for name, array in arrays.items()}
    windowed["x"] = arrays["x"][places]
    if "y" in arrays:
        windowed["y"] = _of_window(arrays["y"][places])
    return windowed


def _of_window(labels: NDArray[Any]) -> NDArray[Any]:
    """Label of each window, from those of its rows [N, window, ...]."""
    if labels.dtype.kind == "f":
        return np.asarray(labels.mean(axis=1, dtype=np.float64), np.float32)
    found, counts = np.unique(labels, return_inverse=True)
    shares = np.stack([(counts.reshape(labels.shape) == number).sum(axis=1) for number in range(len(found))], axis=1)
    best = shares.max(axis=1, keepdims=True)
    numbered = counts.reshape(labels.shape)
    first = np.argmax(np.take_along_axis(shares == best, numbered, axis=1), axis=1)
    return np.asarray(labels[np.arange(len(labels)), first])
