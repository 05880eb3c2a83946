"""What weights are like: the norms of the factors and of the weights they compose, and the ranks of these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.loading import read_personal
from fedpara_edge.factors.compose import compose_named, part_shapes
from fedpara_edge.factors.layout import FACTORS, UPDATE, LayerSpec, Layout
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.simulation.tasks.engines import bundle_at

Tensors = Mapping[str, NDArray[Any]]
"""All trained tensors of a model, shared and personal, by name."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Norms and ranks of some weights.

    Args:
        factor_norm: Norm of all factors together; None if there are none.
        weight_norm: Norm of all that is trained, composed where it is factored.
        ranks: Ranks of the composed weights by layer; None if they were not asked for, or too expensive.
    """

    factor_norm: float | None
    weight_norm: float
    ranks: Mapping[str, int] | None


def measure_weights(*, bundle: Path, weights: Path, state: Path | None, most_operations: float) -> Measures:
    """Measure some weights.

    Args:
        bundle: Bundle folder that the weights belong to.
        weights: Weights file.
        state: State folder with a client's personal tensors; None for the initial ones.
        most_operations: Most multiplications that the ranks may take; 0 to leave them out.

    Raises:
        FedparaError: A file is damaged.
    """
    opened = bundle_at(bundle)
    layout = opened.manifest.layout
    personal = opened.read_initial_personal()
    if state is not None and personal:
        personal |= read_personal(opened, state)
    tensors = {**read_weights(weights).whole, **personal}
    return Measures(
        factor_norm=factor_norm(layout, tensors),
        weight_norm=weight_norm(layout, tensors),
        ranks=weight_ranks(layout, tensors) if 0 < rank_operations(layout) <= most_operations else None,
    )


def factor_norm(layout: Layout, tensors: Tensors) -> float | None:
    """Frobenius norm of all factors together; None if there are none, or none but those of updates."""
    squares = [_square(tensors[tensor.name]) for tensor in layout.tensors if tensor.part in FACTORS - UPDATE]
    return math.sqrt(sum(squares)) if squares else None


def weight_norm(layout: Layout, tensors: Tensors) -> float:
    """Frobenius norm of all that is trained, composed where it is factored: comparable between kinds."""
    layers = {layer.name for layer in layout.layers}
    rest = [
        tensor
        for tensor in layout.trained
        if tensor.part not in FACTORS and not (tensor.part == "weight" and tensor.layer in layers)
    ]
    composed = sum(_square(compose_named(layout, layer, tensors)) for layer in _trained(layout, tensors))
    return math.sqrt(composed + sum(_square(tensors[tensor.name]) for tensor in rest))


def weight_ranks(layout: Layout, tensors: Tensors) -> dict[str, int]:
    """Numerical rank of every composed weight as a matrix [O, I K1 K2], by layer; composed in double precision."""
    return {
        layer.name: int(np.linalg.matrix_rank(compose_named(layout, layer, tensors).reshape(layer.matrix_shape)))
        for layer in _trained(layout, tensors)
        if layer.kind != "dense"
    }


def rank_operations(layout: Layout) -> int:
    """Number of multiplications that the ranks take, about: 4 m n min(m, n) for singular values of [m, n].

    Source: Golub and Van Loan, Matrix Computations.
    """
    shapes = [layer.matrix_shape for layer in layout.layers if layer.kind != "dense"]
    return sum(4 * rows * columns * min(rows, columns) for rows, columns in shapes)


def _trained(layout: Layout, tensors: Tensors) -> list[LayerSpec]:
    return [
        layer
        for layer in layout.layers
        if all(layout.parts(layer)[part].name in tensors for part in part_shapes(layer))
    ]


def _square(tensor: NDArray[Any]) -> float:
    values = tensor.reshape(-1).astype(np.float64)
    return float(values @ values)
