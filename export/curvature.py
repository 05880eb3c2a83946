"""Largest curvature of a loss along the trained parameters of a model, without forming a matrix.

The curvature is that of Gauss and Newton, G = Jᵀ H J, with J the derivative of all outputs of a batch by the parameters
and H the second derivative of the loss by these outputs. A product with it takes one pass for J v, as the derivative of
u ↦ Jᵀ u, which is linear, one for H, and one for Jᵀ. Lanczos' method finds the largest eigenvalue from a few of these;
it keeps two vectors rather than all, as copies of an eigenvalue that it has found already do no harm here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Loss = Callable[[Sequence[Tensor]], Tensor]
"""Function from outputs to the loss []."""

PRODUCTS = 12
"""Most products with G."""
_RESIDUAL = 0.05


def largest_curvature(
    outputs: Sequence[Tensor], loss: Loss, parameters: Sequence[Tensor], *, products: int = PRODUCTS
) -> float | None:
    """Largest eigenvalue of G = Jᵀ H J.

    Args:
        outputs: Outputs of a model, each of which depends on one of the parameters.
        loss: Loss of such outputs.
        parameters: Parameters of the model.
        products: Most products with G.

    Returns:
        Eigenvalue, with a residual of at most 5 %; None where it is not positive, or so many products don't find it.

    Raises:
        RuntimeError: Torch can't differentiate an operator twice.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # H = 2 / n = 1, so that G = XᵀX = diag(9, 1)
    >>> round(largest_curvature([layer(x)], lambda outputs: outputs[0].square().mean(), [layer.weight]), 3)
    9.0
    """
    product = _products(outputs, loss, parameters)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(each.shape, generator=generator) for each in parameters]
    length = math.sqrt(_dot(vector, vector))
    before = [torch.zeros_like(each) for each in vector]
    diagonal: list[float] = []
    beside: list[float] = []  # the diagonal of what G is in the basis of the vectors so far
    for _ in range(products):
        vector = [each / length for each in vector]
        found = product(vector)
        diagonal.append(_dot(found, vector))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        across = beside[-1] if beside else 0.0
        rest = [g - diagonal[-1] * v - across * b for g, v, b in zip(found, vector, before, strict=True)]
        length = math.sqrt(_dot(rest, rest))
        if length * abs(vectors[-1, -1]) <= _RESIDUAL * values[-1]:
            return float(values[-1]) if values[-1] > 0 else None
        beside.append(length)
        before, vector = vector, rest
    return None


def _products(
    outputs: Sequence[Tensor], loss: Loss, parameters: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Function from v, in the shapes of the parameters, to G v."""
    probes = [torch.ones_like(output, requires_grad=True) for output in outputs]
    pulled = _gradients(outputs, parameters, probes, create_graph=True)
    detached = [output.detach().requires_grad_() for output in outputs]
    slopes = _gradients([loss(detached)], detached, None, create_graph=True)

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        pushed = _gradients(pulled, probes, vector)
        return _gradients(outputs, parameters, _gradients(slopes, detached, pushed))

    return product


def _gradients(
    values: Sequence[Tensor],
    by: Sequence[Tensor],
    vectors: Sequence[Tensor] | None,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """Sum of the values' derivatives by each tensor times a vector for each value; zero where there is none."""
    varying = [number for number, value in enumerate(values) if value.requires_grad]
    if not varying:
        return [torch.zeros_like(each) for each in by]
    found = torch.autograd.grad(
        [values[number] for number in varying],
        by,
        None if vectors is None else [vectors[number] for number in varying],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
    )
    return [torch.zeros_like(each) if part is None else part for each, part in zip(by, found, strict=True)]


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return math.fsum(float((a * b).sum()) for a, b in zip(one, other, strict=True))
