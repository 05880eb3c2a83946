"""Derivative of a composed weight with respect to its factors, as the products J v and Jᵀ u, without forming J.

With D1, D2 the entrywise derivatives of the weight with respect to its branches W1, W2 (W2 and W1 for FedPara;
W2 + 1 and W1 for pFedPara; with tanh also times 1 − tanh²; 1 for low-rank),

    J v = D1 ⊙ dW1 + D2 ⊙ dW2,    dW = dX Yᵀ + X dYᵀ,    in tensor form dW = T ×₁ dX ×₂ Y + T ×₁ X ×₂ dY + dT ×₁ X ×₂ Y

Source: FedPara (arXiv 2108.06098v3), supplement B, derives the same from the chain rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.factors.compose import combine, compose_branch, factor_shapes
from fedpara_edge.factors.layout import LayerSpec

Array = NDArray[np.float64]
Factors = dict[str, Array]


class Linearization:
    """Linearization of a factored layer's weight around given values of its factors.

    Args:
        layer: Factored layer, that is, one that is not dense.
        factors: Float arrays by part.

    Attributes:
        weight: Composed weight, float64 of `layer.shape`.

    >>> layer = LayerSpec(name="fc", operator="linear", kind="fedpara", form="matrix", shape=(4, 3), rank=2)
    >>> random = np.random.default_rng(0)
    >>> draw = lambda: {part: random.standard_normal(shape) for part, shape in factor_shapes(layer).items()}
    >>> here, direction, weight = Linearization(layer, draw()), draw(), random.standard_normal((4, 3))
    >>> pulled = here.pull(weight)
    >>> bool(np.isclose(np.sum(here.push(direction) * weight), sum(np.sum(direction[p] * pulled[p]) for p in pulled)))
    True
    """

    def __init__(self, layer: LayerSpec, factors: Mapping[str, Any]) -> None:
        self._layer = layer
        self._factors = {part: np.asarray(factors[part], np.float64) for part in factor_shapes(layer)}
        branches = [compose_branch(layer, self._factors, index) for index in ((1,) if self._is_single else (1, 2))]
        self.weight: Array = branches[0] if self._is_single else combine(layer, branches[0], branches[1], np.tanh)
        self._slopes = self._derivatives(branches)

    @property
    def _is_single(self) -> bool:
        return self._layer.kind == "lowrank"

    def _derivatives(self, branches: list[Array]) -> list[Array | None]:
        if self._is_single:
            return [None]
        first, second = branches
        if self._layer.kind == "pfedpara":
            return [second + 1, first]
        if self._layer.tanh:
            first, second = np.tanh(first), np.tanh(second)
            return [second * (1 - first**2), first * (1 - second**2)]
        return [second, first]

    def push(self, direction: Mapping[str, Array]) -> Array:
        """J v: first-order change of the weight when the factors move by `direction`, of `layer.shape`."""
        moved: Array = np.zeros(self._layer.shape)
        for index, slope in enumerate(self._slopes, start=1):
            for part in self._parts(index):
                changed = compose_branch(self._layer, {**self._factors, part: direction[part]}, index)
                moved += changed if slope is None else slope * changed
        return moved

    def pull(self, weight: Array) -> Factors:
        """Jᵀ u, with u given as `weight`: gradient of <u, composed weight> with respect to each factor, by part."""
        gradients: Factors = {}
        for index, slope in enumerate(self._slopes, start=1):
            grad_branch = weight if slope is None else slope * weight
            x, y = self._factors[f"x{index}"], self._factors[f"y{index}"]
            if self._layer.form == "matrix":
                flat = grad_branch.reshape(len(x), -1)
                gradients |= {f"x{index}": flat @ y, f"y{index}": flat.T @ x}
            else:
                gradients |= self._pull_tensor(grad_branch, x, y, index)
        return gradients

    def _pull_tensor(self, weight: Array, x: Array, y: Array, index: int) -> Factors:
        rank, rows, columns = self._layer.rank, len(x), len(y)
        core = self._factors[f"t{index}"].reshape(rank, rank, -1)
        by_inner = (x.T @ weight.reshape(rows, -1)).reshape(rank, columns, -1)  # [R, I, K1 K2]
        inner = y @ core
        return {
            f"x{index}": weight.reshape(rows, -1) @ inner.reshape(rank, -1).T,
            f"y{index}": np.einsum("rik,rsk->is", by_inner, core, optimize=True),
            f"t{index}": (y.T @ by_inner).reshape(self._factors[f"t{index}"].shape),
        }

    def _parts(self, index: int) -> list[str]:
        return [part for part in self._factors if part.endswith(str(index))]
