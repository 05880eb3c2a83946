"""Decision on each weight of a model: factored and how, or left as it is and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from fedpara_edge.factors.choice import LayerChoice, choose_layer, least_savings
from fedpara_edge.factors.compose import factor_count
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.factors.rank import UpdateOptions
from fedpara_edge.nn.layers import FactoredLayer
from fedpara_edge.nn.selection import FROZEN, Weight, has_own_rank, is_depthwise, last_match, reason_to_leave, ties


@dataclass(frozen=True)
class Decision:
    """Decision on a weight.

    Args:
        spec: Spec of the layer as it will be; None where this package describes none.
        reason: Reason why it is left as it is; "" if it is factored.
        note: Reason why form or rank are others than requested; "" if they are not.
    """

    spec: LayerSpec | None
    reason: str = ""
    note: str = ""


def decide(model: nn.Module, weights: Mapping[str, Weight], factorization: Factorization) -> dict[str, Decision]:
    """Decisions on the weights of a model, by name.

    Args:
        model: Model that has the weights.
        weights: Weights by name.
        factorization: Layers to factor, and how.
    """
    tied = ties(model, weights)
    decisions: dict[str, Decision] = {}
    choices: dict[str, LayerChoice] = {}
    for name, weight in weights.items():
        reason = reason_to_leave(name, weight, include=factorization.include, exclude=factorization.exclude)
        if reason == FROZEN and has_own_rank(name, factorization):
            reason = ""
        if not reason and is_depthwise(weight.layer) and not has_own_rank(name, factorization):
            reason = "depthwise: factors of its small kernels save little, and what they can't fit costs accuracy"
        if not reason and name in tied:
            reason = f"its weight is also {tied[name]!r}, and a composed weight can't be tied"
        if reason or weight.value is None:
            decisions[name] = Decision(_spec_now(name, weight), reason)
        else:
            choices[name] = _choose(name, tuple(weight.value.shape), factorization)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    choices |= _small_ones(choices, factorization, trained)
    for name, (spec, reason, note) in choices.items():
        dense = spec.kind == "dense"
        decisions[name] = Decision(spec, (reason or "kind is dense") if dense else "", note)
    return decisions


def _choose(name: str, shape: tuple[int, ...], factorization: Factorization) -> LayerChoice:
    gamma = last_match(name, factorization.gamma_of)
    return choose_layer(
        name,
        shape,
        kind=factorization.kind,
        form=factorization.form,
        gamma=factorization.gamma if gamma is None else gamma,
        rank=last_match(name, factorization.rank_of),
        tanh=factorization.tanh,
        schedule=factorization.rank_schedule,
        update=UpdateOptions(
            scale=factorization.scale,
            reset_every=factorization.reset_every or 1,
            base_momentum=factorization.base_momentum or 0.0,
        ),
    )


def _small_ones(
    choices: Mapping[str, LayerChoice], factorization: Factorization, parameters: int
) -> dict[str, LayerChoice]:
    """Choices of the factored layers that save so little that they stay dense, but for those with a γ or rank given."""
    if factorization.rank_schedule == "paper":
        return {}
    savings = {}
    for name, (spec, *_) in choices.items():
        given = last_match(name, factorization.rank_of) or last_match(name, factorization.gamma_of) is not None
        if spec.kind != "dense" and not given:
            fedpara = _choose(
                name,
                spec.shape,
                replace(factorization, kind="fedpara", scale=None, reset_every=None, base_momentum=None),
            ).spec
            savings[name] = spec.dense_parameters - factor_count(fedpara)
    return {
        name: LayerChoice(
            choose_layer(name, choices[name].spec.shape, kind="dense").spec,
            f"factors of full rank would save {savings[name]:,} of the model's {parameters:,} parameters",
        )
        for name in least_savings(savings, parameters)
    }


def _spec_now(name: str, weight: Weight) -> LayerSpec | None:
    if isinstance(weight.layer, FactoredLayer):
        return weight.layer.spec
    plain = isinstance(weight.layer, nn.Linear | nn.Conv2d | nn.LSTM | nn.GRU)
    if weight.value is None or not plain or (isinstance(weight.layer, nn.Conv2d) and weight.layer.groups != 1):
        return None
    return choose_layer(name, tuple(weight.value.shape), kind="dense").spec
