"""Torch's optimizers and gradient clipping in numpy, in place, for an engine whose runtime lacks them.

Weights and gradients are sequences of float32 vectors, the pieces of all trained entries, always the same and in the
same order. Pieces of some ten thousand entries stay in the processor's cache from one operation to the next. A state is
one float32 vector [P] over all pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.protocol import Adjustment
from device_runtime.engines.vector import Vector, pieces


class Optimizer(Protocol):
    """Optimizer that changes weights by gradients.

    Attributes:
        state: Everything that a later step depends on, by name; filled in place when restored.
    """

    state: dict[str, NDArray[np.float32]]

    def step(self, weights: Sequence[Vector], gradients: Sequence[Vector], learning_rate: float) -> None:
        """Take one step: `weights` changes in place, `gradients` is overwritten."""
        ...


def make_optimizer(constants: Mapping[str, Any], weights: Sequence[Vector]) -> Optimizer:
    """Optimizer of a bundle, with a fresh state.

    Args:
        constants: Name and constants of the optimizer, as in `Manifest.optimizer`.
        weights: Weights that it will change, float32 vectors.
    """
    if constants["name"] == "sgd":
        return SGD(weights, momentum=constants.get("momentum", 0.0))
    first, second = constants["betas"]
    return AdamW(weights, betas=(first, second), eps=constants["eps"], weight_decay=constants["weight_decay"])


class SGD:
    """Optimizer `torch.optim.SGD`: b ← momentum · b + g, w ← w − lr · b; without momentum w ← w − lr · g."""

    def __init__(self, weights: Sequence[Vector], *, momentum: float = 0.0) -> None:
        self._momentum = momentum
        self.state = {"momentum": _zeros(weights)} if momentum else {}

    def step(self, weights: Sequence[Vector], gradients: Sequence[Vector], learning_rate: float) -> None:
        """Take one step."""
        buffers = pieces(self.state["momentum"], weights) if self._momentum else gradients
        for weight, gradient, buffer in zip(weights, gradients, buffers, strict=True):
            if self._momentum:
                buffer *= self._momentum
                buffer += gradient
            np.multiply(buffer, learning_rate, out=gradient)
            weight -= gradient


class AdamW:
    """Optimizer `torch.optim.AdamW`; with steps t from 1:

        m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
        w ← (1 − lr · decay) w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

    The state holds m / (1 − β₁) and v / (1 − β₂), which saves passes over them.
    """

    def __init__(
        self, weights: Sequence[Vector], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self._betas, self._eps, self._decay = betas, eps, weight_decay
        self.state = {
            "moment1": _zeros(weights),
            "moment2": _zeros(weights),
            "steps": np.zeros((), np.float32),
        }

    def step(self, weights: Sequence[Vector], gradients: Sequence[Vector], learning_rate: float) -> None:
        """Take one step."""
        first, second = self._betas
        self.state["steps"] += 1
        steps = float(self.state["steps"])
        deviation = math.sqrt(
            (1 - second) / (1 - second**steps)
        )  # √v / √(1 − β₂ᵗ) is this times the root of the stored moment
        rate = learning_rate * (1 - first) / (1 - first**steps) / deviation
        eps = self._eps / deviation
        moments = (pieces(self.state[name], weights) for name in ("moment1", "moment2"))
        for weight, gradient, mean, square in zip(weights, gradients, *moments, strict=True):
            if self._decay:
                weight *= 1 - learning_rate * self._decay
            mean *= first
            mean += gradient
            np.square(gradient, out=gradient)
            square *= second
            square += gradient
            np.sqrt(square, out=gradient)
            gradient += eps
            np.divide(mean, gradient, out=gradient)
            gradient *= rate
            weight -= gradient


def adjust(
    gradients: Sequence[Vector],
    weights: Sequence[Vector],
    adjustment: Adjustment,
    h: Sequence[Vector] | None,
    mu: Sequence[Vector] | None = None,
) -> None:
    """Apply an `Adjustment` to the gradients, in place.

    Args:
        gradients: Gradients, changed in place.
        weights: Weights before the step.
        adjustment: Adjustment to apply.
        h: Summands h of the adjustment in the same pieces; None for zeros.
        mu: Factors μ of the adjustment in the same pieces, where they differ; None for `adjustment.mu` everywhere.
    """
    for number, gradient in enumerate(gradients):
        if mu is not None:
            gradient += weights[number] * mu[number]
        elif adjustment.mu:
            gradient += weights[number] * adjustment.mu
        if h is not None:
            gradient += h[number]
    if math.isfinite(adjustment.max_norm):
        norm = math.sqrt(sum(float(np.square(gradient).sum()) for gradient in gradients))
        scale = adjustment.max_norm / (norm + 1e-6)
        for gradient in gradients if not scale >= 1 else ():
            gradient *= scale


def _zeros(weights: Sequence[Vector]) -> Vector:
    return np.zeros(sum(map(len, weights)), np.float32)
