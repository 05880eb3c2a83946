"""Conversion of any PyTorch model to one whose layers are factored.

The given model is not touched: a deep copy is converted and returned, with a report of what became of each layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import factor_count
from fedpara_edge.factors.factorization import COMPOSED, Factorization
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.nn.attention import without_nested_tensors
from fedpara_edge.nn.batchnorm import replace_batchnorms
from fedpara_edge.nn.decision import Decision, decide
from fedpara_edge.nn.factored import factored_like
from fedpara_edge.nn.freezing import freeze
from fedpara_edge.nn.inventory import take_inventory
from fedpara_edge.nn.report import ConversionReport, LayerReport
from fedpara_edge.nn.selection import Weight, check_patterns, find_weights
from fedpara_edge.nn.weightnorm import copied

DEFAULT = Factorization()


def convert(
    model: nn.Module, factorization: Factorization = DEFAULT, *, pretrained: bool = False, new: Collection[str] = ()
) -> tuple[nn.Module, ConversionReport]:
    """Replace layers with factored ones, in a copy of the model: linear, convolution, recurrent, attention, embedding.

    The layers are those of the table in `fedpara_edge.nn.counterparts`. Some are left as they are, and reported with
    the reason: excluded layers, frozen ones without a γ or rank of their own, subclasses, layers whose weight is tied
    or computed (weight norm) or that have hooks, and layers that factors would not make smaller. A module used in
    several places is converted once and stays shared. With kind `dense`, only BatchNorm is considered.

    A recurrent or an attention layer has several weights, each of which counts as a layer with a name of its own, such
    as `lstm.weight_hh_l0` or `attention.q_proj`; the pattern `lstm.*` matches them all.

    Args:
        model: Model to convert, with float parameters on any device; not modified.
        factorization: Layers to factor, and how.
        pretrained: Whether to fit the factors to the weights and keep the biases, instead of drawing new factors and
            zeroing the biases. The biases of recurrent layers, which torch doesn't start at zero, and all biases with
            init `own` are kept either way.
        new: Names of the weights that are not pretrained although the others are, such as those of a new head.

    Returns:
        Converted copy, and the report.

    Raises:
        InputError: A pattern matches no layer, or nothing is left to train; a BatchNorm is refused; a lazy module has
            no shape yet; or `init` is given with `pretrained`.

    >>> model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 99))
    >>> converted, report = convert(model, Factorization(gamma=0.1))
    >>> print(report)
    0: fedpara R=24, 200,704 -> 49,920 entries
    2: fedpara R=13, 25,344 -> 9,230 entries
    biases, normalizations and other vectors: 355 entries
    226,403 -> 59,505 parameters
    """
    init = factorization.init
    if pretrained and init not in COMPOSED:
        raise InputError(
            f"expected composed or own with pretrained, which factors are fitted to, found {init!r}", key="init"
        )
    result = copied(model)
    weights = find_weights(result)
    for option in ("include", "exclude", "gamma_of", "rank_of"):
        check_patterns(option, getattr(factorization, option), weights)
    freeze(result, factorization.freeze)
    decisions = decide(result, weights, factorization)
    inventory = take_inventory(result, weights)
    factored: dict[nn.Module, dict[str, LayerSpec]] = {}
    for name, decision in decisions.items():
        if decision.spec is not None and not decision.reason:
            factored.setdefault(weights[name].layer, {})[weights[name].part] = decision.spec
    made_anew = {id(parameter) for name, parameter in result.named_parameters(remove_duplicate=False) if name in new}
    replacements: dict[nn.Module, nn.Module] = {}
    errors: dict[str, float] = {}
    for layer, layer_specs in factored.items():
        held = {id(parameter) for part in layer_specs for parameter in Weight(layer, part).parameters}
        is_new = bool(held & made_anew)
        replacements[layer], layer_errors = factored_like(
            layer, layer_specs, init=init, pretrained=pretrained and not is_new
        )
        errors |= layer_errors
    norms, messages = replace_batchnorms(result, factorization.batchnorm)
    result = _substitute(result, {**replacements, **norms})
    without_nested_tensors(result)
    layers = [
        LayerReport(
            name=name,
            spec=decision.spec,
            reason=decision.reason,
            note=decision.note,
            relative_error=errors.get(name),
            entries=entries,
            entries_after=factor_count(decision.spec) if entries and decision.spec and not decision.reason else entries,
        )
        for name, entries in inventory.entries.items()
        for decision in [decisions.get(name) or Decision(None, inventory.others[name])]
    ]
    vectors = inventory.vectors, take_inventory(result, find_weights(result)).vectors
    return result, ConversionReport(
        layers=tuple(layers), messages=tuple(messages), vectors=vectors[0], vectors_after=vectors[1]
    )


def _substitute(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)
