"""Initialization of the factors such that the weight they compose to has He's variance, 2 / fan_in.

The paper says "He" without saying of what. He applied to each factor composes to a weight 26 to 118 times too small
(measured), which does not train. Here the composed weight itself gets rms √(2 / fan_in), fan_in = I K1 K2:

1. every factor is drawn from N(0, s²), with s such that a branch has unit variance:
   s⁴ = 1/R for X Yᵀ, s⁶ = 1/R² for T ×₁ X ×₂ Y;
2. the branches are composed once, and scaled so that the rms of the combined weight is exactly the wanted one;
3. the scale c of a branch is spread evenly over its factors: c^(1/2) each, or c^(1/3) in tensor form.

Source: He et al. 2015 (arXiv 1502.01852) for the variance; the derivation from the composed weight is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedpara_edge.factors import combine, compose_branch
from fedpara_edge.layout import LayerSpec

TANH_STD_LIMIT = 0.5
"""Largest rms asked of a weight with tanh, whose entries stay below 1: closer to 1, tanh has no gradient left."""

PERSONAL_STD_LIMIT = 0.25
"""Largest rms of W2 in `pfedpara`, so that W2 + 1 starts near 1 even where He's variance is large."""


def he_std(spec: LayerSpec) -> float:
    """Standard deviation √(2 / fan_in) of the composed weight; at most `TANH_STD_LIMIT` with tanh (fan_in < 8).

    >>> spec = LayerSpec(name="c", operator="conv2d", kind="fedpara", form="tensor", shape=(8, 2, 1, 1), rank=2)
    >>> he_std(spec)
    1.0
    """
    std = math.sqrt(2 / spec.matrix_shape[1])
    return min(std, TANH_STD_LIMIT) if spec.tanh else std


@torch.no_grad()
def initialize(spec: LayerSpec, factors: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> None:
    """Fill the factors of a layer in place, so that the composed weight has rms `he_std(spec)`.

    Args:
        spec: the layer.
        factors: float tensors by part, with the shapes of `fedpara_edge.factors.factor_shapes`.
        generator: where the numbers come from; torch's global generator (`torch.manual_seed`) if None.

    >>> spec = LayerSpec(name="fc", operator="linear", kind="fedpara", form="matrix", shape=(64, 50), rank=4)
    >>> factors = {part: torch.empty(rows, 4) for part, rows in (("x1", 64), ("y1", 50), ("x2", 64), ("y2", 50))}
    >>> initialize(spec, factors)
    >>> weight = (factors["x1"] @ factors["y1"].T) * (factors["x2"] @ factors["y2"].T)
    >>> round(weight.square().mean().sqrt().item(), 4)
    0.2
    """
    if any(tensor.is_meta for tensor in factors.values()):
        return
    if spec.kind == "dense":
        factors["weight"].normal_(0.0, he_std(spec), generator=generator)
        return
    per_branch = 2 if spec.form == "matrix" else 3
    unit = spec.rank ** (-1 / 4 if spec.form == "matrix" else -1 / 3)
    for tensor in factors.values():
        tensor.normal_(0.0, unit, generator=generator)
    exact = {part: tensor.double() for part, tensor in factors.items()}
    branches = [compose_branch(spec, exact, index) for index in ((1,) if spec.kind == "lowrank" else (1, 2))]
    scales = _branch_scales(spec, branches)
    for part, tensor in factors.items():
        tensor.mul_(scales[int(part[1]) - 1] ** (1 / per_branch))


def _branch_scales(spec: LayerSpec, branches: list[Tensor]) -> tuple[float, ...]:
    """What to multiply W1 (and W2) by: closed forms, but for tanh."""
    target = he_std(spec)
    if spec.kind == "lowrank":
        return (target / _rms(branches[0]),)
    w1, w2 = branches
    if spec.kind == "pfedpara":
        second = min(target, PERSONAL_STD_LIMIT) / _rms(w2)
        return target / _rms(combine(spec, w1, second * w2, torch.tanh)), second
    scale = math.sqrt(target / _rms(w1 * w2))
    return (scale, scale) if not spec.tanh else (_tanh_scale(spec, w1, w2, scale),) * 2


def _tanh_scale(spec: LayerSpec, w1: Tensor, w2: Tensor, low: float) -> float:
    """The scale that gives tanh(c W1) ⊙ tanh(c W2) its rms, which grows with c; without tanh it would be `low`."""
    target, high = he_std(spec), 2 * low
    while _rms(combine(spec, high * w1, high * w2, torch.tanh)) < target:
        low, high = high, 2 * high
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        enough = _rms(combine(spec, middle * w1, middle * w2, torch.tanh)) >= target
        low, high = (low, middle) if enough else (middle, high)
    return high


def _rms(weight: Tensor) -> float:
    return weight.square().mean().sqrt().item()
