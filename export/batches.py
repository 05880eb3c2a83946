"""Batches to verify an export with: rows of real data where there are any, or else random ones as the model expects.

A random float32 input lies around the declared mean with the declared standard deviation, channel by channel, so that
the model sees N(0, 1) after its preprocessing; uint8 likewise in its own units, rounded and clipped. Tokens, classes
and pixels without a declared mean are uniform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.forward.preprocess import Preprocessing
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import ArraySpec, Head
from fedpara_edge.losses import OwnLoss

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """Rows of every input and every label, by name, in the order in which the model and the loss take them."""

    inputs: Arrays
    labels: Arrays

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.inputs.values())))

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """All inputs, then all labels."""
        return [*self.inputs.values(), *self.labels.values()]


def joined(batches: Sequence[Batch]) -> Batch:
    """Rows of several batches in one."""
    first = batches[0]
    return Batch(
        {name: np.concatenate([batch.inputs[name] for batch in batches]) for name in first.inputs},
        {name: np.concatenate([batch.labels[name] for batch in batches]) for name in first.labels},
    )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Source of batches.

    Args:
        inputs: Specs of the inputs.
        preprocessings: Preprocessing of each input.
        heads: Heads, whose labels and losses say what labels there are.
        seed: Seed of what is drawn.
        examples: Real rows of some or all of the inputs and labels, by name; the others are drawn.

    Raises:
        InputError: Real rows are of another shape or dtype than the model's, or none.
    """

    inputs: Sequence[ArraySpec]
    preprocessings: Sequence[Preprocessing]
    heads: Sequence[Head] = ()
    seed: int
    examples: Arrays = field(default_factory=dict)

    def __post_init__(self) -> None:
        for spec in self.inputs:
            if spec.name in self.examples:
                _check(self.examples[spec.name], spec)
        for head in self.heads:
            if head.label.name in self.examples:
                is_own = isinstance(head.loss, OwnLoss) and head.loss.kind == "numbers"
                remedy = "add :kind=classes to the loss if they are classes, or reshape it" if is_own else _RESHAPE
                _check(self.examples[head.label.name], head.label, ignored=head.loss.ignored, remedy=remedy)

    def draw(self, rows: int, number: int = 0) -> Batch:
        """The batch of that many rows with that number, always the same."""
        generator = np.random.default_rng([self.seed, rows, number])
        chosen = generator.random(rows)  # alike for all arrays
        inputs = {
            spec.name: self._real(spec, chosen) if spec.name in self.examples else _inputs(spec, each, rows, generator)
            for spec, each in zip(self.inputs, self.preprocessings, strict=True)
        }
        labels = {
            head.label.name: self._real(head.label, chosen)
            if head.label.name in self.examples
            else _labels(head, rows, generator)
            for head in self.heads
        }
        return Batch(inputs, labels)

    def _real(self, spec: ArraySpec, chosen: NDArray[Any]) -> NDArray[Any]:
        given = self.examples[spec.name]
        return np.ascontiguousarray(given[(chosen * len(given)).astype(np.int64)], spec.dtype)


def _inputs(spec: ArraySpec, preprocessing: Preprocessing, rows: int, generator: np.random.Generator) -> NDArray[Any]:
    shape = (rows, *spec.shape)
    if preprocessing.as_it_is or (spec.dtype == "uint8" and not preprocessing.normalizes):
        limit = {"uint8": 256, "bool": 2}.get(spec.dtype) or spec.classes
        return generator.integers(0, limit, shape).astype(spec.dtype)
    raw = preprocessing.raw(generator.standard_normal(shape))
    return np.clip(np.rint(raw), 0, 255).astype(np.uint8) if spec.dtype == "uint8" else raw.astype(spec.dtype)


def _labels(head: Head, rows: int, generator: np.random.Generator) -> NDArray[Any]:
    """Labels of which, if the loss ignores one, about a quarter is that one, and the first is not."""
    shape = (rows, *head.label.shape)
    if head.label.classes is None:
        return generator.random(shape, dtype=np.float32)
    labels = generator.integers(0, head.label.classes, shape)
    if head.loss.ignored is not None:
        labels[generator.random(shape) < _IGNORED] = head.loss.ignored
        first = labels.reshape(-1)[:1]
        if first[0] == head.loss.ignored:
            first[0] = 1 if head.loss.ignored == 0 else 0
    return labels


_IGNORED = 0.25


_RESHAPE = "reshape it, or give the shape of its rows as the input's"


def _check(array: NDArray[Any], spec: ArraySpec, *, ignored: int | None = None, remedy: str = _RESHAPE) -> None:
    if array.ndim == 0 or array.shape[1:] != spec.shape or not len(array):
        raise InputError(
            f"array {spec.name!r}: expected at least one row of shape {list(spec.shape)}, found {list(array.shape)}; "
            f"{remedy}",
            key="example",
        )
    if spec.classes is None:
        good = array.dtype == spec.dtype and bool(np.isfinite(array).all())
        expected = f"finite {spec.dtype}"
    else:
        known = array if ignored is None else array[array != ignored]
        good = array.dtype.kind in "iu" and bool(((known >= 0) & (known < spec.classes)).all())
        expected = f"integers in [0, {spec.classes})"
    if not good:
        found = f"{array.dtype} in [{array.min()}, {array.max()}]" if array.dtype.kind in "iuf" else str(array.dtype)
        raise InputError(f"array {spec.name!r}: expected {expected}, found {found}; convert it", key="example")
