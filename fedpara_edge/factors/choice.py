"""Choice of the factors of each layer: none, or their form and rank, with the reason.

Two rank schedules. `paper` takes the rank r of the paper's schedule (`fedpara_edge.factors.rank`) for every layer whose
factors are then smaller than the weight. In tensor form, its r_min looks at O and I alone: a first convolution with one
input channel gets rank 1, where all filters are multiples of one another. `full`, the default, factors a layer at full
rank or not at all:

1. where r attains less than the rank min(O, I K1 K2) of the dense weight, the layer gets the smaller of the tensor form
   at the smallest rank that attains it, R² >= min(O, I K1 K2), and the matrix form at its own r, which always does;
2. a 1x1 convolution gets the matrix form: the core of the tensor form would be a matrix between X and Y;
3. the layers that save least stay dense, as long as all of them together save at most 0.1 % of the model's parameters.

All kinds leave the same layers dense as `fedpara`.

Source: FedPara (arXiv 2108.06098v3), Corollary 1 and section 3.1, for `paper`; `full` is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import attainable_rank, factor_count
from fedpara_edge.factors.layout import Form, Kind, LayerSpec
from fedpara_edge.factors.rank import UpdateOptions, equal_size_rank, layer_spec, minimum_rank, scheduled_rank

RankSchedule = Literal["full", "paper"]

SMALL_SHARE = 0.001
"""Largest share of a model's parameters that layers are left dense for."""


class LayerChoice(NamedTuple):
    """Specification of a layer, with reasons.

    Attributes:
        spec: Specification of the layer.
        reason: Reason why the layer stays dense although a factored kind was requested; "" if it is factored.
        note: Reason why form or rank are others than requested; "" if they are not.
    """

    spec: LayerSpec
    reason: str = ""
    note: str = ""


def choose_layer(
    name: str,
    shape: tuple[int, ...],
    *,
    kind: Kind = "fedpara",
    form: Form = "tensor",
    gamma: float = 0.1,
    rank: int | None = None,
    tanh: bool = False,
    schedule: RankSchedule = "full",
    update: UpdateOptions = UpdateOptions(),
) -> LayerChoice:
    """Layer of the given kind, or a dense one where factors would not be smaller than the weight.

    `fedpara` and `pfedpara` take the rank of the schedule, `lowrank` and `update` the rank of equal size to FedPara at
    the same γ.
    A layer for which no rank is both small and expressive enough stays dense.

    Args:
        name: Dotted module path, for the spec and for errors.
        shape: Shape of the dense weight: [O, I] makes a linear layer, [O, I, K1, K2] a conv2d.
        kind: Kind of the layer.
        form: Form of the factors of a conv2d; ignored for a linear layer, which has the matrix form only. An update has
            that form too, and as many entries as FedPara factors of this one.
        gamma: Parameter γ of the schedule, in [0, 1].
        rank: Rank to use instead of the schedule's.
        tanh: Whether to use the variant with tanh, for `fedpara` only.
        schedule: Rank schedule, of which rule 3 is `least_savings`.
        update: Options of the kind `update`.

    Raises:
        InputError: `gamma`, `rank` or `shape` is out of range, or `tanh` is requested for a kind other than `fedpara`.

    >>> choose_layer("fc", (256, 784), gamma=0.5).spec.rank
    56
    >>> choose_layer("head", (2, 16)).reason
    'full rank needs R = 2, whose 72 factor entries are more than the 32 of the dense weight'
    >>> choose_layer("patch", (192, 3, 16, 16)).note
    'matrix form, as the tensor form attains rank 9 of 192 with R = 3'
    """
    form = "matrix" if len(shape) == 2 else form
    dense = layer_spec(shape, name=name, kind="dense", form=form, rank=0)
    if kind == "dense":
        return LayerChoice(dense)
    if rank is not None:
        if rank < 1:
            raise InputError(f"layer {name!r}: expected a rank of at least 1, found {rank}")
        if kind == "update" and rank > (full := min(dense.matrix_shape)):
            return LayerChoice(dense, f"rank {rank} is more than the {full} of the weight")
        spec = layer_spec(
            shape,
            name=name,
            kind=kind,
            form=form,
            rank=rank,
            tanh=tanh,
            update=update,
        )
        not_smaller = _not_smaller(spec, requested=True)
        return LayerChoice(dense, not_smaller) if not_smaller else LayerChoice(spec)
    fedpara, note = _scheduled(shape, form=form, gamma=gamma, schedule=schedule)
    if not_smaller := _not_smaller(fedpara):
        return LayerChoice(dense, not_smaller)
    form, chosen = fedpara.form, fedpara.rank
    if kind in ("lowrank", "update"):
        chosen = equal_size_rank(shape, rank=fedpara.rank, form=form, kind=kind)
        if chosen == 0:
            return LayerChoice(dense, "not even rank 1 is as small as the FedPara factors")
    if kind == "update":
        form, note = "matrix", ""
    spec = layer_spec(
        shape,
        name=name,
        kind=kind,
        form=form,
        rank=chosen,
        tanh=tanh,
        update=update,
    )
    return LayerChoice(spec, note=note)


def least_savings(savings: Mapping[str, int], parameters: int) -> frozenset[str]:
    """Layers that save least, as long as they together save at most `SMALL_SHARE` of a model's parameters.

    Args:
        savings: Number of entries that a layer's factors save, by layer.
        parameters: Number of parameters of the dense model.

    >>> sorted(least_savings({"stem": 40, "body": 50_000, "shortcut": 50, "head": 90}, 100_000))
    ['shortcut', 'stem']
    """
    small, left = set(), SMALL_SHARE * parameters
    for name in sorted(savings, key=lambda name: savings[name]):
        left -= savings[name]
        if left < 0:
            break
        small.add(name)
    return frozenset(small)


def _scheduled(shape: tuple[int, ...], *, form: Form, gamma: float, schedule: RankSchedule) -> tuple[LayerSpec, str]:
    """FedPara layer of a rank schedule, which may have more entries than the weight, and the note of `LayerChoice`."""
    note = ""
    if schedule == "full" and form == "tensor" and math.prod(shape[2:]) == 1:
        form, note = "matrix", "matrix form, as a 1x1 kernel has no use for a core"
    rank = max(scheduled_rank(shape, gamma=gamma, form=form), minimum_rank(shape, form=form))
    spec = layer_spec(shape, kind="fedpara", form=form, rank=rank)
    attained, full = attainable_rank(spec), min(spec.matrix_shape)
    if schedule == "paper" or attained == full:
        return spec, note
    raised = layer_spec(shape, kind="fedpara", form=form, rank=minimum_rank(shape, form="matrix"))
    other, _ = _scheduled(shape, form="matrix", gamma=gamma, schedule=schedule)
    if factor_count(other) < factor_count(raised):
        return other, f"matrix form, as the tensor form attains rank {attained} of {full} with R = {rank}"
    return raised, f"as R = {rank} attains rank {attained} of {full}"


def _not_smaller(spec: LayerSpec, *, requested: bool = False) -> str:
    """Reason to leave a layer dense whose factors, of a requested rank or one that is needed, are not smaller."""
    count = factor_count(spec)
    if count < spec.dense_parameters:
        return ""
    if requested or spec.rank > minimum_rank(spec.shape, form=spec.form):
        return f"rank {spec.rank} needs {count} factor entries, the dense weight has {spec.dense_parameters}"
    return (
        f"full rank needs R = {spec.rank}, whose {count} factor entries are more than the {spec.dense_parameters} of "
        "the dense weight"
    )
