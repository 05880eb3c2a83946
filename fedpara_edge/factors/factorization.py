"""Factorization of a model: which layers are factored, by what kind of factors, and at what rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedpara_edge.factors.choice import RankSchedule
from fedpara_edge.factors.layout import Form, Kind
from fedpara_edge.options import check, option

BatchNorm = Literal["refuse", "freeze", "train", "local", "group"]
Init = Literal["composed", "own", "he_fan_in", "he_fan_out"]
COMPOSED: tuple[Init, ...] = ("composed", "own")
"""Initializations that draw all factors of a weight together, which weights to fit them to may take the place of."""


@dataclass(frozen=True, kw_only=True)
class Factorization:
    """Choice of the layers of a model to factor, and how (`fedpara_edge.convert`).

    Patterns are those of `fnmatch` on dotted layer names, where `*` matches dots as well.

    Args:
        kind: Parameterization of the weights; `dense` leaves every layer as it is.
        gamma: γ of the rank schedule, from the smallest rank (0) to the largest (1) (`fedpara_edge.factors.rank`).
        gamma_of: γ of the layers that match a pattern; the last pattern that matches counts.
        rank_of: Rank of the layers that match a pattern; overrides any γ.
        rank_schedule: `full` to factor a layer at full rank, or to leave it dense where that saves next to nothing;
            `paper` to take every rank as in the paper (`fedpara_edge.factors.choice`).
        form: Factors of convolutions: `tensor` (Proposition 3) or `matrix` (Proposition 1).
        tanh: Whether each Hadamard operand passes through tanh, for kind `fedpara`.
        scale: Scale c of updates; None for that at which steps on the factors move a weight as far as steps on a dense
            one (`fedpara_edge.factors.rank.even_scale`).
        reset_every: Rounds after which updates are folded into the weights and begin in new directions; None for 1.
        base_momentum: Momentum β of the weights that updates are folded into, on the server and all who follow it; None
            for 0 (`fedpara_edge.factors.update`).
        include: Patterns of the layers to factor.
        exclude: Patterns of layers to leave dense, of those included.
        freeze: Patterns of parameters, or of modules that hold them, that are not trained (`fedpara_edge.nn.freezing`).
        batchnorm: Replacement of every BatchNorm (`fedpara_edge.nn.batchnorm`): `refuse` to fail, `freeze` to fix its
            running statistics, `train` to train and average it, `local` to train it and keep it on the device, `group`
            for a GroupNorm of the same parameters.
        init: Initialization of the factors (`fedpara_edge.nn.init`).

    Raises:
        InputError: A value is out of its range.
    """

    kind: Kind = option(
        "fedpara",
        help="Parameterization of the weights; dense leaves every layer as it is, update factors what changes in a "
        "round instead of the weight.",
    )
    gamma: float = option(0.1, minimum=0, maximum=1, help="γ of the rank schedule: smallest (0) to largest rank (1).")
    gamma_of: Mapping[str, float] = option(
        {}, minimum=0, maximum=1, metavar="PATTERN=γ", was=("gammas",), help="γ of the layers that match a pattern."
    )
    rank_of: Mapping[str, int] = option(
        {}, minimum=1, metavar="PATTERN=R", was=("ranks",), help="Rank of the layers that match a pattern."
    )
    rank_schedule: RankSchedule = option(
        "full",
        help="Factor layers at full rank, or leave them dense where that saves next to nothing (full); or take every "
        "rank as in the paper, with which first convolutions lose theirs (paper).",
    )
    form: Form = option("tensor", help="Factors of convolutions: Proposition 3 (tensor) or 1 (matrix).")
    tanh: bool = option(False, help="Pass each Hadamard operand through tanh.")
    scale: float | None = option(
        None,
        minimum=1e-6,
        maximum=1e6,
        only=("kind", ("update",)),
        unset="√(3 / 2R)",
        help="Scale of an update, by which steps of its factors move a weight.",
    )
    reset_every: int | None = option(
        None,
        minimum=1,
        maximum=1_000_000,
        only=("kind", ("update",)),
        unset="1",
        help="Rounds after which updates are folded into the weights and begin in new directions.",
    )
    base_momentum: float | None = option(
        None,
        minimum=0,
        below=1,
        only=("kind", ("update",)),
        unset="0",
        help="Momentum of the weights that updates are folded into; 0.6 goes well with that of fedavgm.",
    )
    include: tuple[str, ...] = option(("*",), metavar="PATTERN", help="Layers to factor.  [default: all]")
    exclude: tuple[str, ...] = option((), metavar="PATTERN", help="Layers to leave dense.")
    freeze: tuple[str, ...] = option(
        (), metavar="PATTERN", help="Layers or tensors that stay as they are, neither trained nor sent."
    )
    batchnorm: BatchNorm = option(
        "refuse",
        help="Refuse a BatchNorm, fix its statistics as they are, train and average them, keep it on the device, or "
        "replace it with a GroupNorm; the zoo's MobileNets train it unless told otherwise.",
    )
    init: Init = option(
        "composed",
        help="Draw the factors for He's variance of the composed weight (composed) or for that of the model's own "
        "weight, with its biases (own), or each by He's rule with its own fan.",
    )

    def __post_init__(self) -> None:
        check(self)
