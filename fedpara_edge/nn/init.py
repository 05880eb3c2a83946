"""Initialization of the factors: of the composed weight (`composed`, `own`), or of each (`he_fan_in`, `he_fan_out`).

The paper says "He" without saying of what. With `composed`, our own, the composed weight itself gets the variance
2 / fan_in, its rms being √(2 / fan_in) with fan_in = I K1 K2:

1. every factor is drawn from N(0, s²), with s such that a branch has unit variance:
   s⁴ = 1/R for X Yᵀ, s⁶ = 1/R² for T ×₁ X ×₂ Y;
2. the branches are composed once, and scaled so that the rms of the combined weight is exactly the requested one;
3. the scale c of a branch is spread evenly over its factors: c^(1/2) each, or c^(1/3) in tensor form.

Recurrent layers ask for torch's own standard deviation instead of He's (`recurrent`). `own` does the same with the rms
that the weight of the model to convert has: what is stable for the model as it was made is then stable for its factors
as well, but a deep network without normalization, for which torch's own start is small, learns more slowly.

Of kind `update`, the base is drawn as the weight of a dense layer, and the factors are zero. Mask and directions are
drawn as the first period might have them; those of a device are other ones.

The other two draw each factor on its own from N(0, 2 / fan), with the fans that torch finds in the authors' code, where
X is [R, O] and Y is [R, I], while they are [O, R] and [I, R] here. The last two rows are the standard deviation of the
weight that `fedpara` composes from them:

|                               | `he_fan_in`       | `he_fan_out`  |
|-------------------------------|-------------------|---------------|
| X [O, R]                      | O                 | R             |
| Y [I, R]; [I K1 K2, R]        | I; I K1 K2        | R             |
| T [R, R, K1, K2]              | R K1 K2           | R K1 K2       |
| weight [O, I, K1, K2], dense  | I K1 K2           | O K1 K2       |
| composed, matrix form         | 4 R / (O I K1 K2) | 4 / R         |
| composed, tensor form         | 8 R / (O I K1 K2) | 8 / (R K1 K2) |

`he_fan_in` is what the authors' code does. In the convolutions of VGG16 at γ = 0.1 it composes to a weight 25 to 118
times too small, which does not train (measured); `he_fan_out` to one 0.8 to 1.6 times the right size.

Source: He et al. 2015 (arXiv 1502.01852) for the variance; the authors' notebook (South-hw/FedPara_ICLR22) for the
fans; the derivation from the composed weight is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import combine, compose_branch, part_shapes
from fedpara_edge.factors.factorization import COMPOSED, Init
from fedpara_edge.factors.layout import LayerSpec

TANH_STD_LIMIT = 0.5
"""Largest rms requested of a weight with tanh, whose entries stay below 1: closer to 1, tanh has no gradient left."""

PERSONAL_STD_LIMIT = 0.25
"""Largest rms of W2 in `pfedpara`, so that W2 + 1 starts near 1 even where He's variance is large."""


def he_std(spec: LayerSpec) -> float:
    """Standard deviation √(2 / fan_in) of the composed weight; at most `TANH_STD_LIMIT` with tanh (fan_in < 8).

    >>> spec = LayerSpec(name="c", operator="conv2d", kind="fedpara", form="tensor", shape=(8, 2, 1, 1), rank=2)
    >>> he_std(spec)
    1.0
    """
    return _attainable(spec, math.sqrt(2 / spec.matrix_shape[1]))


def factor_std(spec: LayerSpec, part: str, *, init: Init) -> float:
    """Standard deviation √(2 / fan) of a factor drawn on its own, or of a weight that is not factored.

    Args:
        spec: Spec of the layer.
        part: Part of the layer that is drawn: a factor such as `x1`, or `weight` or `base`.
        init: `he_fan_in` or `he_fan_out`.

    >>> spec = LayerSpec(name="c", operator="conv2d", kind="fedpara", form="tensor", shape=(128, 32, 3, 3), rank=8)
    >>> [factor_std(spec, part, init="he_fan_in") for part in ("x1", "y1")]
    [0.125, 0.25]
    >>> [factor_std(spec, part, init="he_fan_out") for part in ("x1", "y1")]
    [0.5, 0.5]
    """
    outputs, inputs, *window = part_shapes(spec)[part]
    if part[0] in "xy":
        outputs, inputs = inputs, outputs  # as the authors' code has them
    return math.sqrt(2 / ((inputs if init == "he_fan_in" else outputs) * math.prod(window)))


@torch.no_grad()
def initialize(
    spec: LayerSpec,
    factors: Mapping[str, Tensor],
    *,
    init: Init = "composed",
    std: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Fill the factors of a layer in place; with `composed` and `own`, so that the weight has the requested rms.

    Args:
        spec: Spec of the layer.
        factors: Float tensors by part, with the shapes of `fedpara_edge.factors.compose.part_shapes`.
        init: Initialization to use.
        std: Rms of the weight for `composed` and `own`, at most `TANH_STD_LIMIT` with tanh; `he_std(spec)` if None.
        generator: Source of the random numbers; torch's global generator (`torch.manual_seed`) if None.

    Raises:
        InputError: `init` is unknown.

    >>> spec = LayerSpec(name="fc", operator="linear", kind="fedpara", form="matrix", shape=(64, 50), rank=4)
    >>> factors = {part: torch.empty(rows, 4) for part, rows in (("x1", 64), ("y1", 50), ("x2", 64), ("y2", 50))}
    >>> initialize(spec, factors)
    >>> weight = (factors["x1"] @ factors["y1"].T) * (factors["x2"] @ factors["y2"].T)
    >>> round(weight.square().mean().sqrt().item(), 4)
    0.2
    """
    if init not in get_args(Init):
        raise InputError(f"layer {spec.name!r}: init: expected one of {', '.join(get_args(Init))}, found {init!r}")
    if any(tensor.is_meta for tensor in factors.values()):
        return
    if spec.kind == "update":
        he = std is None and init not in COMPOSED
        target = factor_std(spec, "base", init=init) if he else he_std(spec) if std is None else std
        factors["base"].normal_(0.0, target, generator=generator)
        factors["mask"].bernoulli_(0.5, generator=generator).mul_(-2 * spec.scale).add_(spec.scale)
        for part in ("a", "b"):
            factors[part].uniform_(-1.0, 1.0, generator=generator)
        for part in ("u", "v"):
            factors[part].zero_()
        return
    if init not in COMPOSED:
        for part, tensor in factors.items():
            tensor.normal_(0.0, factor_std(spec, part, init=init), generator=generator)
        return
    target = he_std(spec) if std is None else _attainable(spec, std)
    if spec.kind == "dense":
        factors["weight"].normal_(0.0, target, generator=generator)
        return
    per_branch = 2 if spec.form == "matrix" else 3
    unit = spec.rank ** (-1 / 4 if spec.form == "matrix" else -1 / 3)
    for tensor in factors.values():
        tensor.normal_(0.0, unit, generator=generator)
    exact = {part: tensor.double() for part, tensor in factors.items()}
    branches = [compose_branch(spec, exact, index) for index in ((1,) if spec.kind == "lowrank" else (1, 2))]
    scales = _branch_scales(spec, branches, target)
    for part, tensor in factors.items():
        tensor.mul_(scales[int(part[1]) - 1] ** (1 / per_branch))


def _attainable(spec: LayerSpec, std: float) -> float:
    return min(std, TANH_STD_LIMIT) if spec.tanh else std


def _branch_scales(spec: LayerSpec, branches: list[Tensor], target: float) -> tuple[float, ...]:
    """Scales for W1 (and W2) with which they combine to rms `target`: closed forms, except with tanh."""
    if spec.kind == "lowrank":
        return (target / _rms(branches[0]),)
    w1, w2 = branches
    if spec.kind == "pfedpara":
        second = min(target, PERSONAL_STD_LIMIT) / _rms(w2)
        return target / _rms(combine(spec, w1, second * w2, torch.tanh)), second
    scale = math.sqrt(target / _rms(w1 * w2))
    return (scale, scale) if not spec.tanh else (_tanh_scale(spec, w1, w2, target, scale),) * 2


def _tanh_scale(spec: LayerSpec, w1: Tensor, w2: Tensor, target: float, low: float) -> float:
    """Scale c that gives tanh(c W1) ⊙ tanh(c W2) its rms, which grows with c; without tanh it would be `low`."""
    high = 2 * low
    while _rms(combine(spec, high * w1, high * w2, torch.tanh)) < target:
        low, high = high, 2 * high
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        enough = _rms(combine(spec, middle * w1, middle * w2, torch.tanh)) >= target
        low, high = (low, middle) if enough else (middle, high)
    return high


def _rms(weight: Tensor) -> float:
    return weight.square().mean().sqrt().item()
