"""What the weights of a model are like: the norms of its factors and of the weights they compose, and their ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.loading import read_personal
from fedpara_edge.factors.compose import compose, factor_shapes
from fedpara_edge.factors.layout import FACTORS, LayerSpec, Layout
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.simulation.tasks.engines import bundle_at

CHEAP_OPERATIONS = 2_000_000_000
"""About 0.3 s of singular values on one core: what the ranks may cost in a round that is not the last."""

Tensors = Mapping[str, NDArray[Any]]
"""All trained tensors of a model, shared and personal, by name."""


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Weights to measure.

    Args:
        bundle: what they are weights of.
        weights: the file.
        state: state folder with a client's personal tensors; None for the initial ones.
        ranks: whether the ranks are wanted, unless they are too dear.
        at_any_cost: whether they are wanted all the same.
    """

    bundle: Path
    weights: Path
    state: Path | None
    ranks: bool
    at_any_cost: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What they are like."""

    factor_norm: float | None
    weight_norm: float
    ranks: Mapping[str, int] | None


def measure(measuring: Measuring) -> Measured:
    """Norms and ranks of some weights.

    Raises:
        FedparaError: a file is damaged.
    """
    bundle = bundle_at(measuring.bundle)
    layout = bundle.manifest.layout
    personal = bundle.read_initial_personal()
    if measuring.state is not None and personal:
        personal |= read_personal(bundle, measuring.state)
    tensors = {**read_weights(measuring.weights).tensors, **personal}
    factored = any(layer.kind != "dense" for layer in layout.layers)
    cheap = rank_operations(layout) <= CHEAP_OPERATIONS
    wanted = factored and measuring.ranks and (cheap or measuring.at_any_cost)
    return Measured(
        factor_norm=factor_norm(layout, tensors),
        weight_norm=weight_norm(layout, tensors),
        ranks=ranks(layout, tensors) if wanted else None,
    )


def factor_norm(layout: Layout, tensors: Tensors) -> float | None:
    """Frobenius norm of all factors together; None if there are none."""
    squares = [_square(tensors[tensor.name]) for tensor in layout.tensors if tensor.part in FACTORS]
    return math.sqrt(sum(squares)) if squares else None


def weight_norm(layout: Layout, tensors: Tensors) -> float:
    """Frobenius norm of all that is trained, composed where it is factored: comparable between kinds."""
    layers = {layer.name for layer in layout.layers}
    rest = [
        tensor
        for tensor in layout.with_role("shared", "personal")
        if tensor.part not in FACTORS and not (tensor.part == "weight" and tensor.layer in layers)
    ]
    composed = sum(_square(_compose(layout, layer, tensors)) for layer in _trained(layout, tensors))
    return math.sqrt(composed + sum(_square(tensors[tensor.name]) for tensor in rest))


def ranks(layout: Layout, tensors: Tensors) -> dict[str, int]:
    """Numerical rank of every composed weight, seen as a matrix [O, I K1 K2], by layer; factors in double precision."""
    return {
        layer.name: int(np.linalg.matrix_rank(_compose(layout, layer, tensors).reshape(layer.matrix_shape)))
        for layer in _trained(layout, tensors)
        if layer.kind != "dense"
    }


def rank_operations(layout: Layout) -> int:
    """About how many multiplications `ranks` takes: 4 m n min(m, n) for singular values of [m, n] (Golub, Van Loan)."""
    shapes = [layer.matrix_shape for layer in layout.layers if layer.kind != "dense"]
    return sum(4 * rows * columns * min(rows, columns) for rows, columns in shapes)


def _trained(layout: Layout, tensors: Tensors) -> list[LayerSpec]:
    return [
        layer
        for layer in layout.layers
        if all(layout.parts(layer)[part].name in tensors for part in factor_shapes(layer))
    ]


def _compose(layout: Layout, layer: LayerSpec, tensors: Tensors) -> NDArray[np.float64]:
    names = {part: tensor.name for part, tensor in layout.parts(layer).items()}
    parts = {part: tensors[names[part]].astype(np.float64) for part in factor_shapes(layer)}
    weight: NDArray[np.float64] = compose(layer, parts, np.tanh)
    return weight


def _square(tensor: NDArray[Any]) -> float:
    values = tensor.reshape(-1).astype(np.float64)
    return float(values @ values)
