"""The optimizers of bundles, and the adjustment of gradients, in torch, in place, on vectors of all weights.

They are those of `device_runtime.engines.optimizers`. Numbers that change from step to step are tensors, so that a step
can be recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """Optimizer that changes weights by gradients.

    Attributes:
        state: Everything that a later step depends on, by name.
    """

    state: dict[str, Tensor]

    def step(self, weights: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """Take one step with a learning rate []: `weights` changes in place, `gradient` is overwritten."""
        ...


def make_optimizer(constants: Mapping[str, Any], weights: Tensor) -> Optimizer:
    """Optimizer of a bundle, with a fresh state.

    Args:
        constants: Name and constants of the optimizer, as in `Manifest.optimizer`.
        weights: Weights that it will change, float32 [P].
    """
    if constants["name"] == "sgd":
        return SGD(weights, momentum=constants.get("momentum", 0.0))
    first, second = constants["betas"]
    return AdamW(weights, betas=(first, second), eps=constants["eps"], weight_decay=constants["weight_decay"])


class SGD:
    """Optimizer `torch.optim.SGD`: b ← momentum · b + g, w ← w − lr · b; without momentum w ← w − lr · g."""

    def __init__(self, weights: Tensor, *, momentum: float = 0.0) -> None:
        self._momentum = momentum
        self.state = {"momentum": torch.zeros_like(weights)} if momentum else {}

    def step(self, weights: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """Take one step."""
        if self._momentum:
            gradient = self.state["momentum"].mul_(self._momentum).add_(gradient)
        weights.addcmul_(gradient, rate, value=-1)


class AdamW:
    """Optimizer `torch.optim.AdamW`, with bias corrections in double precision.

    The state holds m / (1 − β₁) and v / (1 − β₂), which saves passes over them.
    """

    def __init__(self, weights: Tensor, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self._betas, self._eps, self._decay = betas, eps, weight_decay
        self.state = {
            "moment1": torch.zeros_like(weights),
            "moment2": torch.zeros_like(weights),
            "steps": weights.new_zeros(()),
        }

    def step(self, weights: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """Take one step."""
        first, second = self._betas
        steps = self.state["steps"].add_(1).double()
        deviation = ((1 - second) / (1 - second**steps)).sqrt()
        step = (rate * (1 - first) / (1 - first**steps) / deviation).float()
        eps = (self._eps / deviation).float()
        if self._decay:
            weights.mul_(1 - rate * self._decay)
        mean = self.state["moment1"].mul_(first).add_(gradient)
        square = self.state["moment2"].mul_(second).addcmul_(gradient, gradient)
        torch.sqrt(square, out=gradient)
        gradient.add_(eps)
        torch.div(mean, gradient, out=gradient)
        weights.addcmul_(gradient, step, value=-1)


@dataclass(frozen=True)
class Form:
    """Form of an adjustment a = g + μ w + h, clipped to a norm: what of it there is.

    Args:
        factors: Number of factors μ; 0 if all are zero.
        with_h: Whether there is an h.
        max_norm: Largest norm; infinite for no clipping.
    """

    factors: int = 0
    with_h: bool = False
    max_norm: float = math.inf


def adjust(gradient: Tensor, weights: Tensor, form: Form, mu: Tensor | None, h: Tensor | None) -> None:
    """Apply an adjustment (`device_runtime.engines.protocol.Adjustment`) to a gradient, in place.

    Args:
        gradient: Gradient [P], changed in place.
        weights: Weights [P] before the step.
        form: Form of the adjustment.
        mu: Factors μ, [P] or [1], if there are any.
        h: Summands h [P], if there are any.
    """
    if form.factors and mu is not None:
        gradient.addcmul_(weights, mu)
    if form.with_h and h is not None:
        gradient.add_(h)
    if math.isfinite(form.max_norm):
        gradient.mul_((form.max_norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0))
