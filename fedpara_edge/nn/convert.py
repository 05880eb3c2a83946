"""From any PyTorch model to one whose Linear and Conv2d layers are factored.

The model given is not touched: a deep copy is converted and returned, with a report of what became of each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpara_edge.errors import InputError
from fedpara_edge.layout import Form, Kind, LayerSpec
from fedpara_edge.nn.fit import fit_factors
from fedpara_edge.nn.groupnorm import group_norm_like
from fedpara_edge.nn.layers import Conv2d, FactoredLayer, Linear
from fedpara_edge.nn.report import ConversionReport, LayerReport
from fedpara_edge.nn.selection import check_patterns, find_layers, last_match, reason_to_leave
from fedpara_edge.rank import choose_layer


def convert(
    model: nn.Module,
    *,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    gammas: Mapping[str, float] | None = None,
    ranks: Mapping[str, int] | None = None,
    batchnorm: Literal["refuse", "group"] = "refuse",
    pretrained: bool = False,
) -> tuple[nn.Module, ConversionReport]:
    """Replace `nn.Linear` and `nn.Conv2d` by factored layers, in a copy of the model.

    Left as they are, and reported with the reason: excluded, grouped and frozen layers, subclasses of the two, layers
    whose weight is computed (weight norm) or that have hooks, and layers that factors would not make smaller. A module
    used in several places is converted once and stays one. With kind `dense`, only BatchNorm is looked at.

    Args:
        model: any model; float parameters, on any device. Not modified.
        kind: what to make of the layers.
        gamma: γ of the rank schedule (`fedpara_edge.rank`).
        form: form of the factors of convolutions.
        tanh: the variant with tanh, for `fedpara`.
        include: fnmatch patterns of dotted layer names to convert; `*` also matches dots.
        exclude: patterns of layers to leave, after `include`.
        gammas: γ by pattern, for some layers; the last pattern that matches counts.
        ranks: rank by pattern, likewise; goes before any γ.
        batchnorm: `refuse` a BatchNorm with an error, or replace it by a `group` norm with the same affine parameters.
        pretrained: fit the factors to the weights and keep the biases, instead of drawing and zeroing them anew.

    Returns:
        The converted copy, and the report.

    Raises:
        InputError: a pattern matches no layer; a BatchNorm is refused; a weight to convert belongs to another module
            as well; a lazy module has no shape yet; or an option is out of range.

    >>> model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2))
    >>> converted, report = convert(model, gamma=0.1)
    >>> print(report)
    0: fedpara R=24, 200,704 -> 49,920 entries
    2: unchanged: full rank needs R = 2, whose 1032 factor entries are more than the 512 of the dense weight
    201,474 -> 50,690 parameters
    """
    result = copy.deepcopy(model)
    layers = find_layers(result)
    gammas, ranks = dict(gammas or {}), dict(ranks or {})
    for option, patterns in {"include": include, "exclude": exclude, "gammas": gammas, "ranks": ranks}.items():
        check_patterns(option, patterns, layers)
    replacements: dict[nn.Module, nn.Module] = {}
    reports = []
    for name, layer in layers.items():
        reason = reason_to_leave(name, layer, include=include, exclude=exclude)
        if reason or not isinstance(layer, nn.Linear | nn.Conv2d):
            reports.append(LayerReport(name=name, spec=_spec_now(name, layer), reason=reason))
            continue
        layer_gamma = last_match(name, gammas)
        spec, reason = choose_layer(
            name,
            tuple(layer.weight.shape),
            kind=kind,
            form=form,
            gamma=gamma if layer_gamma is None else layer_gamma,
            rank=last_match(name, ranks),
            tanh=tanh,
        )
        if spec.kind == "dense":
            reports.append(LayerReport(name=name, spec=spec, reason=reason or "kind is dense"))
            continue
        _check_untied(name, layer, result)
        replacements[layer], error = _factored(layer, spec, pretrained=pretrained)
        reports.append(LayerReport(name=name, spec=spec, relative_error=error))
    messages = _replace_batchnorms(result, batchnorm, replacements)
    result = _substitute(result, replacements)
    before, after = _trainable(model), _trainable(result)
    return result, ConversionReport(
        layers=tuple(reports), messages=tuple(messages), parameters=before, parameters_after=after
    )


def _spec_now(name: str, layer: nn.Module) -> LayerSpec | None:
    if isinstance(layer, FactoredLayer):
        return layer.spec
    weight = layer._parameters.get("weight")
    if weight is None or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
        return None
    return choose_layer(name, tuple(weight.shape), kind="dense").spec


def _check_untied(name: str, layer: nn.Linear | nn.Conv2d, model: nn.Module) -> None:
    for other, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if parameter is layer.weight and module is not layer:
                tied = f"{other}.{part}" if other else part
                raise InputError(
                    f"layer {name!r}: its weight is also {tied!r}, and a composed weight can't be tied; "
                    f"exclude {name!r}, or give each its own weight"
                )


def _factored(layer: nn.Linear | nn.Conv2d, spec: LayerSpec, *, pretrained: bool) -> tuple[FactoredLayer, float | None]:
    """The layer that `spec` describes, with the operator, device, dtype and bias of the given one; and the error."""
    device, dtype = layer.weight.device, layer.weight.dtype
    new: FactoredLayer
    if isinstance(layer, nn.Linear):
        new = Linear(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            device=device,
            dtype=dtype,
            kind=spec.kind,
            rank=spec.rank,
            tanh=spec.tanh,
            name=spec.name,
        )
    else:
        new = Conv2d(
            layer.in_channels,
            layer.out_channels,
            (spec.shape[2], spec.shape[3]),
            stride=(layer.stride[0], layer.stride[1]),
            padding=layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1]),
            dilation=(layer.dilation[0], layer.dilation[1]),
            bias=layer.bias is not None,
            device=device,
            dtype=dtype,
            kind=spec.kind,
            rank=spec.rank,
            form=spec.form,
            tanh=spec.tanh,
            name=spec.name,
        )
    error = None
    with torch.no_grad():
        if pretrained:
            fit = fit_factors(spec, layer.weight)
            error = fit.relative_error
            for part, factor in new.factors().items():
                factor.copy_(fit.factors[part])
        elif layer.bias is not None:
            layer.bias.zero_()
    new._parameters["bias"] = layer._parameters["bias"]  # the object itself, which may be tied or frozen
    return new.train(layer.training), error


def _replace_batchnorms(model: nn.Module, choice: str, replacements: dict[nn.Module, nn.Module]) -> list[str]:
    if choice not in ("refuse", "group"):
        raise InputError(f"batchnorm: expected 'refuse' or 'group', found {choice!r}")
    messages = []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if choice == "refuse":
            raise InputError(
                f"module {name!r}: {type(module).__name__} keeps running statistics, which neither average over "
                "clients nor train on every engine; replace it by GroupNorm, or convert with batchnorm='group'"
            )
        replacements[module] = norm = group_norm_like(module)
        groups = f"{norm.num_groups} group{'s' if norm.num_groups > 1 else ''}"
        messages.append(
            f"{name}: {type(module).__name__} replaced by GroupNorm with {groups}, running statistics dropped"
        )
    return messages


def _substitute(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
