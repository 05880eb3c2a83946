"""A sample of the entries of a layer's weight, and the entries of its factors that they depend on.

An entry of W depends on one row of X, one of Y and, in tensor form, on all of T at its position of the kernel window:

    W[o, i, k] = Π over branches of Σ_ab T[a, b, k] X[o, a] Y[i, b]

The sample is a block: `ROWS` rows of X, as many of Y, and as many positions k as keep their slices of T within
`CORE_ENTRIES`, at least one; all of them evenly spaced. With a rank above 64 there are fewer rows of X, as each costs
R² operations for every update, position and branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.factors.compose import combine, factor_shapes
from fedpara_edge.factors.layout import FACTORS, UPDATE, LayerSpec, Layout, TensorSpec

ROWS = 16
CORE_ENTRIES = 1 << 12
PRODUCT_OPERATIONS = 1 << 16


@dataclass(frozen=True)
class PartSample:
    """The sampled entries of one factor.

    Args:
        name: Name of the tensor.
        positions: Positions of the entries in the tensor in C order, int64, ascending.
        shape: Shape of the block they form: [rows, R] of X or Y, [R, R, positions] of T.
    """

    name: str
    positions: NDArray[np.int64]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerSample:
    """The sample of one layer.

    Args:
        layer: The layer.
        branches: Numbers of the branches whose factors all travel; the compared weight is made of these.
        parts: Samples of the branches' factors, by part.
        shape: Shape of the sampled weight: [rows, rows], in tensor form [positions, rows, rows].
    """

    layer: LayerSpec
    branches: tuple[int, ...]
    parts: Mapping[str, PartSample]
    shape: tuple[int, ...]

    @property
    def factor_entries(self) -> int:
        """Number of entries of the factors that are sampled."""
        return sum(len(part.positions) for part in self.parts.values())

    def compose(self, factors: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The sampled weight of several updates, [updates, *shape], from [updates, *part.shape] for each part."""
        weights = [self._branch(factors, index) for index in self.branches]
        if len(weights) == 2:
            return np.asarray(combine(self.layer, weights[0], weights[1], np.tanh))
        return np.tanh(weights[0]) if self.layer.tanh else weights[0]

    def _branch(self, factors: Mapping[str, NDArray[np.float64]], index: int) -> NDArray[np.float64]:
        x, y = factors[f"x{index}"], factors[f"y{index}"].swapaxes(-1, -2)
        if self.layer.form == "matrix":
            return x @ y
        core = np.ascontiguousarray(np.moveaxis(factors[f"t{index}"], -1, 1))  # [updates, positions, R, R]
        return x[:, None] @ core @ y[:, None]


def sample_layer(layout: Layout, layer: LayerSpec) -> LayerSample | None:
    """The sample of one layer; None if it has no branch of factors that all travel."""
    tensors = {part: tensor for part, tensor in layout.parts(layer).items() if tensor.role == "shared"}
    by_branch: dict[int, list[str]] = {}
    for part in factor_shapes(layer):
        if part in FACTORS - UPDATE:
            by_branch.setdefault(int(part[-1]), []).append(part)
    branches = tuple(index for index, parts in by_branch.items() if tensors.keys() >= set(parts))
    if not branches:
        return None
    samples = {part: _sample_part(layer, tensors[part]) for index in branches for part in by_branch[index]}
    first = branches[0]
    rows = samples[f"x{first}"].shape[0], samples[f"y{first}"].shape[0]
    shape = rows if layer.form == "matrix" else (samples[f"t{first}"].shape[-1], *rows)
    return LayerSample(layer, branches, samples, shape)


def _sample_part(layer: LayerSpec, tensor: TensorSpec) -> PartSample:
    rank = layer.rank
    if tensor.part.startswith("t"):
        window = math.prod(tensor.shape[2:])
        chosen = evenly(window, CORE_ENTRIES // rank**2)
        positions = (np.arange(rank * rank)[:, None] * window + chosen).reshape(-1)
        return PartSample(tensor.name, positions, (rank, rank, len(chosen)))
    most = ROWS
    if tensor.part.startswith("x"):
        most = min(ROWS, PRODUCT_OPERATIONS // rank**2)
    chosen = evenly(tensor.shape[0], most)
    positions = (chosen[:, None] * rank + np.arange(rank)).reshape(-1)
    return PartSample(tensor.name, positions, (len(chosen), rank))


def evenly(available: int, most: int) -> NDArray[np.int64]:
    """Evenly spaced numbers below `available`, at most `most` of them and one at least; none of nothing.

    >>> evenly(9, 3), evenly(3, 9)
    (array([1, 4, 7]), array([0, 1, 2]))
    """
    taken = min(available, max(1, most))
    return (2 * np.arange(taken) + 1) * available // (2 * taken) if taken else np.arange(0)
