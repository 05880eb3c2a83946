"""Rank R of a layer: the paper's schedule between the smallest useful rank and the largest affordable one.

    r = (1 - γ) r_min + γ r_max, rounded half up, with one γ in [0, 1] for all layers

r_min is the smallest R whose weight can have full rank, r_max the largest whose FedPara factors have no more
entries than the dense weight. Shapes are those of the dense weight, [O, I] or [O, I, K1, K2].

Source: FedPara (arXiv 2108.06098v3), Corollary 1 and section 3.1; the paper does not state the rounding, and half up is
what reproduces its Table 5. VGG16 for 10 classes then has 925,720 parameters at γ 0 and 1,546,620 at γ 0.1. For r_min
the authors' notebook takes the larger of the two roots (951,334 at γ 0); Flower's baseline rounds r up (1,546,844 at
γ 0.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import factor_count
from fedpara_edge.factors.layout import Form, Kind, LayerSpec, Operator


def minimum_rank(shape: tuple[int, ...], *, form: Form = "tensor") -> int:
    """Smallest rank at which full rank is attainable: min(⌈√m⌉, ⌈√n⌉), from R² >= min(m, n) (Corollary 1).

    (m, n) is (O, I) for a linear layer and for the tensor form, as in the paper, and (O, I K1 K2) for the matrix form
    of a convolution. In tensor form the kernel does not count: with I = 1 the result is 1, and all filters of a layer
    of that rank are multiples of one another (`fedpara_edge.factors.choice` sees to such layers).

    >>> minimum_rank((256, 256)), minimum_rank((64, 3, 3, 3)), minimum_rank((64, 3, 3, 3), form="matrix")
    (16, 2, 6)
    """
    rows, columns = layer_spec(shape, kind="dense", form=form, rank=0).matrix_shape
    return _ceil_sqrt(min(rows, columns if form == "matrix" else shape[1]))


def maximum_rank(shape: tuple[int, ...], *, form: Form = "tensor") -> int:
    """Largest rank at which the FedPara factors have no more entries than the dense weight; 0 if there is none.

    >>> maximum_rank((256, 256)), maximum_rank((512, 512, 3, 3)), maximum_rank((2, 2))
    (64, 309, 0)
    """
    return _largest_rank(shape, kind="fedpara", form=form, budget=math.prod(shape))


def scheduled_rank(shape: tuple[int, ...], *, gamma: float, form: Form = "tensor") -> int:
    """Rank of the schedule, (1 - γ) r_min + γ r_max rounded half up; γ is taken as the decimal number it prints as.

    Raises:
        InputError: `gamma` is not in [0, 1].

    >>> [scheduled_rank((512, 512, 3, 3), gamma=gamma) for gamma in (0, 0.1, 0.5, 1)]
    [23, 52, 166, 309]
    """
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma: expected a number from 0 to 1, found {gamma}")
    share = Fraction(str(gamma))
    low, high = minimum_rank(shape, form=form), maximum_rank(shape, form=form)
    return math.floor((1 - share) * low + share * high + Fraction(1, 2))


def equal_size_rank(shape: tuple[int, ...], *, rank: int, form: Form = "tensor", kind: Kind = "lowrank") -> int:
    """Rank of `lowrank` or `update`: the largest with at most as many entries as FedPara at `rank`; 0 if none.

    A linear layer gets exactly 2R. A convolution in tensor form gets less than 2R, since the Tucker core grows with
    the square of its rank: Table 1 prints 21K for the low-rank convolution of rank 32, which is FedPara's own count at
    R = 16; a Tucker-2 of rank 32 has 25.6K, and the one of at most 21K has rank 27.

    >>> equal_size_rank((256, 256), rank=16), equal_size_rank((256, 256, 3, 3), rank=16)
    (32, 27)
    """
    budget = factor_count(layer_spec(shape, kind="fedpara", form=form, rank=rank))
    return _largest_rank(shape, kind=kind, form=form, budget=budget)


def _largest_rank(shape: tuple[int, ...], *, kind: Kind, form: Form, budget: int) -> int:
    most = min(shape[0], math.prod(shape[1:])) if kind == "update" else budget
    low, high = 0, min(budget, most) + 1  # the count at `low` fits, that at `high` does not: each rank adds at least 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = factor_count(layer_spec(shape, kind=kind, form=form, rank=middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """Options of a layer of kind `update` (`fedpara_edge.factors.update`).

    Args:
        scale: Scale c, above 0; the even one of the rank (`even_scale`) if None.
        reset_every: Rounds after which the update is folded and begins anew, at least 1.
        base_momentum: Momentum β of the base, from 0 to below 1.
    """

    scale: float | None = None
    reset_every: int = 1
    base_momentum: float = 0.0

    @classmethod
    def of(cls, layer: LayerSpec) -> UpdateOptions:
        """Options of a layer, with which another of its kind and rank has the same; the usual ones for other kinds."""
        if layer.kind != "update":
            return cls()
        scale = None if layer.scale == even_scale(layer.rank) else layer.scale  # the even one differs with the rank
        return cls(scale=scale, reset_every=layer.reset_every, base_momentum=layer.base_momentum)


def layer_spec(
    shape: tuple[int, ...],
    *,
    kind: Kind,
    form: Form,
    rank: int,
    name: str = "",
    tanh: bool = False,
    update: UpdateOptions = UpdateOptions(),
) -> LayerSpec:
    """Specification of a layer whose operator follows from its shape, [O, I] or [O, I, K1, K2].

    Linear layers and updates have the matrix form; the options of updates are left out for other kinds.
    """
    operator: Operator = "linear" if len(shape) == 2 else "conv2d"
    form = "matrix" if operator == "linear" or kind == "update" else form
    common = LayerSpec(name=name, operator=operator, kind="dense", form=form, shape=shape, rank=0)
    if kind != "update":
        return replace(common, kind=kind, rank=rank, tanh=tanh)
    return replace(
        common,
        kind=kind,
        rank=rank,
        tanh=tanh,
        scale=even_scale(rank) if update.scale is None else float(update.scale),
        reset_every=update.reset_every,
        base_momentum=float(update.base_momentum),
    )


def even_scale(rank: int) -> float:
    """Scale c of an update at which steps on its factors move the weight as far as steps on a dense one: √(3 / 2R).

    To first order, a step of gradient descent on the factors moves an entry of the weight by c² (‖A_i‖² + ‖B_j‖²) times
    its gradient, and the rows of A and B (`fedpara_edge.factors.update`) have squared norms of about R / 3.

    >>> round(even_scale(12), 3)
    0.354
    """
    return math.sqrt(3 / (2 * max(rank, 1)))


def _ceil_sqrt(number: int) -> int:
    return math.isqrt(number - 1) + 1
