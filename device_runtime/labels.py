"""Labels by the names of their classes: numbered as the bundle's classes are, whatever a device has of them.

A device may have some of the classes only, and in an order of its own. Where the bundle has the names of its classes,
labels that come with names are told apart by these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError, counted
from fedpara_edge.formats.interface import ArraySpec

MOST_NAMES = 10


def numbered(path: Path, labels: NDArray[Any], names: NDArray[Any] | None, spec: ArraySpec) -> NDArray[Any]:
    """Labels with the numbers that the bundle gives to their classes; others as they are.

    Args:
        path: Source of the labels, for messages.
        labels: Labels [N, ...]: numbers, or the names themselves.
        names: Names of the classes in the order of their numbers, strings [K]; None if the labels have none.
        spec: Label of the model.

    Raises:
        InputError: A name is none of the bundle's, or the bundle has no names and the labels not all of its classes.
    """
    if spec.classes is None:
        return labels
    known = spec.class_names
    if labels.dtype.kind in "US" and known is not None:
        names, labels = np.unique(labels, return_inverse=True)
    if names is None and known is not None and labels.dtype.kind in "iu" and all(map(_is_integer, known)):
        names, labels = np.unique(labels, return_inverse=True)
    if names is None or labels.dtype.kind not in "iu":
        return labels
    texts = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names.tolist()]
    if known is None:
        if len(texts) != spec.classes:
            raise InputError(
                f"{path}: expected the {counted(spec.classes, 'class')} of the bundle, found {_listed(texts)}; a "
                "device that has "
                "some of them needs their names in the bundle: export it with --class-names, or number the labels"
            )
        return labels
    return renumbered(path, labels, texts, known)


def renumbered(path: Path, labels: NDArray[Any], names: Sequence[str], known: Sequence[str]) -> NDArray[Any]:
    """Labels with the numbers that their classes have among others.

    Args:
        path: Source of the labels, for messages.
        labels: Labels, integers in [0, K).
        names: Names of the classes, in the order of these numbers, K of them.
        known: Names of the classes, in the order of the numbers to give.

    Raises:
        InputError: A label's class is not among the known ones.

    >>> renumbered(Path("d.csv"), np.array([0, 1, 1]), ["dog", "owl"], ["cat", "dog", "owl"]).tolist()
    [1, 2, 2]
    """
    numbers = {name: number for number, name in enumerate(known)}
    table = np.array([numbers.get(name, -1) for name in names], np.int64)
    found = table[labels]
    if (found < 0).any():
        unknown = names[int(labels[np.unravel_index(int(np.argmin(found)), found.shape)])]
        raise InputError(
            f"{path}: class {unknown!r}: expected one of {_listed(known)}, found another; rename it, or leave it out"
        )
    return np.asarray(found)


def named(labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Labels that are text, as numbers in the order of their names, and these names; None for labels that are numbers.

    >>> numbers, names = named(np.array(["owl", "cat", "owl"]))
    >>> numbers.tolist(), names.tolist()
    ([1, 0, 1], ['cat', 'owl'])
    """
    if labels.dtype.kind not in "US":
        return labels, None
    names, numbers = np.unique(labels.astype(np.str_), return_inverse=True)
    return numbers.astype(np.int64), names


def with_axes(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array [N, ...] with rows of a shape, if nothing but axes of size 1 differ; others as they are.

    >>> with_axes(np.zeros((5, 1, 8)), (8,)).shape, with_axes(np.zeros((5, 2, 8)), (8,)).shape
    ((5, 8), (5, 2, 8))
    """
    sizes = [size for size in array.shape[1:] if size != 1]
    return array.reshape(len(array), *shape) if sizes == [size for size in shape if size != 1] else array


def fitted(arrays: Mapping[str, NDArray[Any]], specs: Mapping[str, ArraySpec]) -> dict[str, NDArray[Any]]:
    """Arrays of a source with the axes of size 1 that a model has, and integers as float32 where it wants those."""
    fitting = {}
    for name, array in arrays.items():
        spec = specs[name]
        wider = spec.dtype == "float32" and array.dtype.kind in "iu" and array.dtype != np.uint8
        fitting[name] = with_axes(array.astype(np.float32) if wider else array, spec.shape)
    return fitting


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _listed(names: Any) -> str:
    names = [*names]
    more = f", … ({len(names)})" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
