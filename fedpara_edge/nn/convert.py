"""Conversion of any PyTorch model to one whose Linear, Conv2d, LSTM and GRU layers are factored.

The given model is not touched: a deep copy is converted and returned, with a report of what became of each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.choice import LayerChoice, choose_layer, least_savings
from fedpara_edge.factors.compose import factor_count
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.nn.batchnorm import replace_batchnorms
from fedpara_edge.nn.factored import factored_like
from fedpara_edge.nn.layers import FactoredLayer
from fedpara_edge.nn.report import ConversionReport, LayerReport
from fedpara_edge.nn.selection import Weight, check_patterns, find_weights, last_match, reason_to_leave

DEFAULT = Factorization()


def convert(
    model: nn.Module, factorization: Factorization = DEFAULT, *, pretrained: bool = False, new: Collection[str] = ()
) -> tuple[nn.Module, ConversionReport]:
    """Replace `nn.Linear`, `nn.Conv2d`, `nn.LSTM` and `nn.GRU` with factored layers, in a copy of the model.

    Some layers are left as they are, and reported with the reason: excluded, grouped and frozen layers, subclasses of
    the four, layers whose weight is computed (weight norm) or that have hooks, and layers that factors would not make
    smaller. A module used in several places is converted once and stays shared. With kind `dense`, only BatchNorm is
    considered.

    A recurrent layer has several weights, each of which counts as a layer with a name of its own, such as
    `lstm.weight_hh_l0`; the pattern `lstm.*` matches them all.

    Args:
        model: Model to convert, with float parameters on any device; not modified.
        factorization: Layers to factor, and how.
        pretrained: Whether to fit the factors to the weights and keep the biases, instead of drawing new factors and
            zeroing the biases. The biases of recurrent layers, which torch doesn't start at zero, are kept either way.
        new: Names of the weights that are not pretrained although the others are, such as those of a new head.

    Returns:
        Converted copy, and the report.

    Raises:
        InputError: A pattern matches no layer; a BatchNorm is refused; a weight to convert belongs to another module
            as well; a lazy module has no shape yet; or `init` is given with `pretrained`.

    >>> model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2))
    >>> converted, report = convert(model, Factorization(gamma=0.1))
    >>> print(report)
    0: fedpara R=24, 200,704 -> 49,920 entries
    2: unchanged: full rank needs R = 2, whose 1032 factor entries are more than the 512 of the dense weight
    201,474 -> 50,690 parameters
    """
    init, exclude = factorization.init, factorization.exclude
    if pretrained and init != "composed":
        raise InputError(f"expected composed with pretrained, which factors are fitted to, found {init!r}", key="init")
    result = copy.deepcopy(model)
    weights = find_weights(result)
    for option in ("include", "exclude", "gamma_of", "rank_of"):
        check_patterns(option, getattr(factorization, option), weights)
    specs: dict[str, LayerSpec | None] = {}
    reasons: dict[str, str] = {}
    choices: dict[str, LayerChoice] = {}
    for name, weight in weights.items():
        reason = reason_to_leave(name, weight, include=factorization.include, exclude=exclude)
        specs[name], reasons[name] = _spec_now(name, weight), reason
        if not reason and weight.parameter is not None:
            choices[name] = _choose(name, tuple(weight.parameter.shape), factorization)
    choices |= _small_ones(choices, factorization, _trainable(model))
    factored: dict[nn.Module, dict[str, LayerSpec]] = {}
    for name, choice in choices.items():
        specs[name], reasons[name] = choice.spec, choice.reason
        if choice.spec.kind == "dense":
            reasons[name] = choice.reason or "kind is dense"
            continue
        _check_untied(name, weights[name], result)
        factored.setdefault(weights[name].layer, {})[weights[name].part] = choice.spec
    replacements: dict[nn.Module, nn.Module] = {}
    errors: dict[str, float] = {}
    for layer, layer_specs in factored.items():
        is_new = any({spec.name, f"{spec.name}.weight".lstrip(".")} & {*new} for spec in layer_specs.values())
        replacements[layer], layer_errors = factored_like(
            layer, layer_specs, init=init, pretrained=pretrained and not is_new
        )
        errors |= layer_errors
    norms, messages = replace_batchnorms(result, factorization.batchnorm)
    result = _substitute(result, {**replacements, **norms})
    before, after = _trainable(model), _trainable(result)
    return result, ConversionReport(
        layers=tuple(
            LayerReport(
                name=name,
                spec=spec,
                reason=reasons[name],
                note=choices[name].note if name in choices else "",
                relative_error=errors.get(name),
            )
            for name, spec in specs.items()
        ),
        messages=tuple(messages),
        parameters=before,
        parameters_after=after,
    )


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
            fedpara = _choose(name, spec.shape, replace(factorization, kind="fedpara")).spec
            savings[name] = spec.dense_parameters - factor_count(fedpara)
    return {
        name: LayerChoice(
            choose_layer(name, choices[name].spec.shape, kind="dense").spec,
            f"factors of full rank would save {savings[name]:,} of the model's {parameters:,} parameters",
        )
        for name in least_savings(savings, parameters)
    }


def _spec_now(name: str, weight: Weight) -> LayerSpec | None:
    layer, parameter = weight.layer, weight.parameter
    if isinstance(layer, FactoredLayer):
        return layer.spec
    if parameter is None or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
        return None
    return choose_layer(name, tuple(parameter.shape), kind="dense").spec


def _check_untied(name: str, weight: Weight, model: nn.Module) -> None:
    for other, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if parameter is weight.parameter and (module, part) != (weight.layer, weight.part):
                tied = f"{other}.{part}" if other else part
                raise InputError(
                    f"layer {name!r}: its weight is also {tied!r}, and a composed weight can't be tied; "
                    f"exclude {name!r}, or give each its own weight"
                )


def _substitute(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
