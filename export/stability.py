"""Largest rate at which SGD is sure to be stable at the start, for mean squared error.

Close to where it is, the loss is a quadratic whose curvature is that of Gauss and Newton, H = 2 Jᵀ J / n with J the
derivative of all n outputs of a batch by the trained parameters, whatever the labels. Gradient descent shrinks the
error along every direction as long as its rate is below 2 / λ, with λ the largest eigenvalue of H, which power
iteration finds. Steps at a few times that rate may still end well, as they lead to where the curvature is lower.

Factors start with He's variance, which a model of torch's own need not have; its larger outputs then make larger steps,
which a squared error does nothing to bound. With cross-entropy, which bounds its gradients, the curvature at the start
says little: deep networks without normalization train well at many times that rate (`benchmarks/rates.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_ITERATIONS = 20


@dataclass(frozen=True)
class StableRates:
    """Largest rates at which SGD is sure to be stable at the start.

    Args:
        factored: Rate of the factored model.
        dense: Rate of the dense model that it was made from.
    """

    factored: float
    dense: float

    @property
    def falls_short(self) -> bool:
        """Whether the factored model is stable at less than half the dense one's rate only."""
        return self.factored < self.dense / 2

    def __str__(self) -> str:
        return (
            f"SGD is sure to be stable up to a rate of {self.factored:.2g} at the start, the dense model up to "
            f"{self.dense:.2g}"
        )


def stable_rates(factored: nn.Module, dense: nn.Module, x: torch.Tensor) -> StableRates | None:
    """Rates of both models (`stable_rate`), or None where one is not known."""
    rates = stable_rate(factored, x), stable_rate(dense, x)
    return None if rates[0] is None or rates[1] is None else StableRates(rates[0], rates[1])


def stable_rate(model: nn.Module, x: torch.Tensor) -> float | None:
    """Rate 2 / λ of a model, or None where an operator has no second derivative in torch, or nothing has any.

    Args:
        model: Model from inputs to one output; not modified.
        x: Inputs as the model takes them, [B, ...].

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> stable_rate(layer, torch.tensor([[3.0, 0.0], [0.0, 1.0]]))  # H = XᵀX = diag(9, 1)
    0.2222222222222222
    """
    model = copy.deepcopy(model).eval()  # running statistics stay
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    # Attention's fused kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        outputs = model(x)
        if not outputs.requires_grad:
            return None
        probe = torch.ones_like(outputs, requires_grad=True)
        gradients = torch.autograd.grad(outputs, trained, probe, create_graph=True, allow_unused=True)
        used = [(p, g) for p, g in zip(trained, gradients, strict=True) if g is not None and g.requires_grad]
        parameters, pulled = [parameter for parameter, _ in used], [gradient for _, gradient in used]
        direction = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
        for _ in range(_ITERATIONS):
            norm = _norm(direction)
            if norm == 0:
                break
            direction = [part / norm for part in direction]
            try:
                (pushed,) = torch.autograd.grad(pulled, probe, direction, retain_graph=True)
            except RuntimeError:  # torch's, of an operator that it can differentiate once only
                return None
            found = torch.autograd.grad(outputs, parameters, pushed, retain_graph=True)
            direction = [2 / outputs.numel() * part for part in found]
            largest = _norm(direction)
    return 2 / largest if largest else None


def _norm(parts: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))
