"""Remedies for arrays that a model can't take: what to type, as far as shapes, dtypes and values tell.

A remedy that keeps every number where it belongs is named with its axes; where several would fit, or none does for
certain, the remedy says what it depends on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.formats.interface import ArraySpec

MOST_AXES = 5
MOST_NAMES = 10
CHANNELS = (1, 3, 4)


def remedy_for_shape(array: NDArray[Any], spec: ArraySpec, *, of_input: bool) -> str:
    """Remedy for an array [N, ...] whose rows have another shape than a model takes.

    >>> remedy_for_shape(np.zeros((9, 32, 32, 3)), ArraySpec("x", (3, 32, 32), "float32"), of_input=True)
    'move the axes with numpy.transpose(x, (0, 3, 1, 2)); a reshape would scramble the values'
    >>> remedy_for_shape(np.zeros((9, 28, 28)), ArraySpec("x", (1, 28, 28), "float32"), of_input=True)
    'add the axis with numpy.expand_dims(x, 1)'
    """
    name, found, expected = spec.name, array.shape[1:], spec.shape
    if array.ndim == 0:
        return "save an array with a row for each example"
    if not of_input and spec.classes is not None:
        if found == (*expected, spec.classes):
            return f"if each row marks its class by the largest number, take numpy.argmax({name}, axis=-1)"
        if len(expected) == len(found) == 1 and found[0] == spec.classes:
            return (
                f"the model's outputs [N, {spec.classes}, {expected[0]}] have their classes along axis 1; if the model "
                "puts them last, end its forward with .movedim(-1, 1) and export again"
            )
    added = _added_axes(found, expected)
    if added is not None:
        return f"add the axis with numpy.expand_dims({name}, {_numbers(added)})"
    removed = _added_axes(expected, found)
    if removed is not None:
        return f"remove the axis with numpy.squeeze({name}, {_numbers(removed)})"
    axes = _moved_axes(found, expected)
    if axes is not None:
        return f"move the axes with numpy.transpose({name}, {(0, *axes)}); a reshape would scramble the values"
    if math.prod(found) == math.prod(expected):
        return (
            f"if each row lies in memory in the order of {list(expected)}, take {name}.reshape({(-1, *expected)}); "
            "otherwise move its axes first"
        )
    if not of_input:
        return "give every example the labels that the model has outputs for, or export the bundle again"
    again = f"export the bundle again with --input-shape {','.join(map(str, found))}" if found else "add its axes"
    if len(found) == len(expected) == 3 and found[-1] == expected[0] in CHANNELS:
        height, width = expected[1:]
        return (
            f"resize the images to {height}x{width} and move their channels first with "
            f"numpy.transpose({name}, (0, 3, 1, 2))"
        )
    return f"bring the examples to that shape, or {again}"


def remedy_for_dtype(array: NDArray[Any], spec: ArraySpec, *, of_input: bool) -> str:
    """Remedy for an array of another dtype than a model takes."""
    name, found = spec.name, array.dtype.name
    if array.dtype.kind in "US":
        return _remedy_for_names(array, spec) if not of_input and spec.classes is not None else "save it as numbers"
    if spec.classes is not None:
        return f"if they are whole numbers, convert it with {name}.astype(numpy.int64)"
    if of_input and (found, spec.dtype) == ("uint8", "float32"):
        return (
            "export the bundle again with --input-dtype uint8, or bring it to the scale of the bundle's model, such as "
            f"({name} / 255).astype(numpy.float32)"
        )
    if of_input and spec.dtype == "uint8" and array.dtype.kind == "f":
        return (
            "export the bundle again with --input-dtype float32, or, if these are pixels from 0 to 1, take "
            f"({name} * 255).round().astype(numpy.uint8)"
        )
    if of_input and spec.dtype == "uint8":
        return f"if all numbers are from 0 to 255, convert it with {name}.astype(numpy.uint8)"
    return f"convert it with {name}.astype(numpy.{spec.dtype})"


def _remedy_for_names(labels: NDArray[Any], spec: ArraySpec) -> str:
    """Remedy for names of classes in place of their numbers: the numbers in the order of the names."""
    names = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in np.unique(labels)]
    if len(names) > (spec.classes or 0):
        return f"number the classes from 0 and leave out what is none: there are {len(names)} names for {spec.classes}"
    shown = ", ".join(f"{name!r}: {number}" for number, name in enumerate(names[:MOST_NAMES]))
    more = ", …" if len(names) > MOST_NAMES else ""
    line = f"{spec.name} = numpy.unique({spec.name}, return_inverse=True)[1]"
    if len(names) == spec.classes:
        return f"number the classes from 0, alike on every device: {{{shown}{more}}}, which {line} does here"
    return (
        f"number the classes from 0, alike on every device; here are {len(names)} of {spec.classes}: "
        f"{', '.join(map(repr, names[:MOST_NAMES]))}{more}"
    )


def _moved_axes(found: Sequence[int], expected: Sequence[int]) -> tuple[int, ...] | None:
    """Axes of [N, *found] in the order of `expected`: the order that moves the fewest; None if there is none."""
    if sorted(found) != sorted(expected) or len(found) > MOST_AXES:
        return None
    fitting = [
        order for order in permutations(range(len(found))) if tuple(found[axis] for axis in order) == tuple(expected)
    ]
    fewest = min(fitting, key=lambda order: sum(later < earlier for earlier, later in _pairs(order)))
    return tuple(axis + 1 for axis in fewest)


def _pairs(order: Sequence[int]) -> list[tuple[int, int]]:
    return [(earlier, later) for place, earlier in enumerate(order) for later in order[place + 1 :]]


def _added_axes(found: Sequence[int], expected: Sequence[int]) -> tuple[int, ...] | None:
    """Axes of size 1 of [N, *expected] that [N, *found] lacks and no other difference; None if there is another."""
    axes, rest = [], list(found)
    for axis, size in enumerate(expected, 1):
        if rest and rest[0] == size:
            rest.pop(0)
        elif size == 1:
            axes.append(axis)
        else:
            return None
    return tuple(axes) if axes and not rest else None


def _numbers(axes: tuple[int, ...]) -> str:
    return str(axes[0]) if len(axes) == 1 else str(axes)
