"""Factored replacement of a torch layer: same operator, options, device, dtype and biases."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpara_edge.factors.choice import choose_layer
from fedpara_edge.factors.factorization import Init
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.factors.rank import UpdateOptions
from fedpara_edge.nn.attention import MultiheadAttention
from fedpara_edge.nn.counterparts import PROJECTIONS, weight_names, weight_of
from fedpara_edge.nn.embedding import Embedding
from fedpara_edge.nn.fit import fit_factors
from fedpara_edge.nn.layers import Conv2d, FactoredLayer, FactoredWeight, Linear
from fedpara_edge.nn.recurrent import GRU, LSTM
from fedpara_edge.nn.wrapped import Wrapped


def factored_like(
    layer: nn.Module, specs: Mapping[str, LayerSpec], *, init: Init, pretrained: bool
) -> tuple[nn.Module, dict[str, float]]:
    """Layer that computes what `layer` does, with weights composed of factors.

    With init `composed`, the weights of linear layers and of convolutions start with He's variance, recurrent ones with
    torch's, and those of any other layer with the rms that the layer's weights have; with `own`, all do so.

    Args:
        layer: Layer of the table in `fedpara_edge.nn.counterparts`.
        specs: Specs of the weights to factor, by the weights' names in the layer.
        init: Initialization of the factors.
        pretrained: Whether to fit the factors to the weights and keep the bias, instead of drawing new factors and
            zeroing the bias, which `own` keeps as well.

    Returns:
        Factored layer, and the relative errors of the fits by the names of the specs.
    """
    if isinstance(layer, nn.LSTM | nn.GRU):
        new, factored = _recurrent_like(layer, specs, init)
    elif isinstance(layer, nn.MultiheadAttention):
        new, factored = _attention_like(layer, specs, init)
    else:
        new = _of_one_weight(layer, specs["weight"], init)
        factored = {"weight": new}
        if not pretrained and init != "own" and layer._parameters.get("bias") is not None:
            nn.init.zeros_(layer.get_parameter("bias"))
        if "bias" in layer._parameters:
            new._parameters["bias"] = layer._parameters["bias"]  # the object itself, which may be tied or frozen
    errors: dict[str, float] = {}
    for name, made in factored.items():
        weight = _weight(layer, name)
        if pretrained:
            errors |= _fit(made, weight)
        for factor in made.factors().values():
            factor.requires_grad_(weight.requires_grad)
    return new.train(layer.training), errors


def _weight(layer: nn.Module, name: str) -> Tensor:
    weight = weight_of(layer, name)
    assert weight is not None
    return weight


def _fit(layer: FactoredLayer, weight: Tensor) -> dict[str, float]:
    fit, parts = fit_factors(layer.spec, weight), layer.parts()
    with torch.no_grad():
        for part, values in fit.factors.items():
            parts[part].copy_(values)
    return {layer.spec.name: fit.relative_error}


def _rms(weight: Tensor) -> float | None:
    """Root mean square of a weight; None for one without values or of zeros alone, whose factors would never train."""
    return None if weight.is_meta else weight.detach().double().square().mean().sqrt().item() or None


def _of_one_weight(layer: nn.Module, spec: LayerSpec, init: Init) -> FactoredLayer:
    if isinstance(layer, nn.Linear):
        return _linear_like(layer, spec, init)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        return _conv2d_like(layer, spec, init)
    if isinstance(layer, nn.Embedding):
        return Embedding(
            spec,
            padding_idx=layer.padding_idx,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
            init=init,
            initial_std=_rms(layer.weight) or 1.0,
        )
    like_conv2d = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    by_he = like_conv2d and init != "own"
    return Wrapped(layer, spec, init=init, initial_std=None if by_he else _rms(_weight(layer, "weight")))


def _linear_like(layer: nn.Linear, spec: LayerSpec, init: Init) -> FactoredLayer:
    return Linear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        kind=spec.kind,
        rank=spec.rank,
        tanh=spec.tanh,
        update=UpdateOptions.of(spec),
        init=init,
        initial_std=_rms(layer.weight) if init == "own" else None,
        name=spec.name,
    )


def _conv2d_like(layer: nn.Conv2d, spec: LayerSpec, init: Init) -> FactoredLayer:
    return Conv2d(
        layer.in_channels,
        layer.out_channels,
        (spec.shape[2], spec.shape[3]),
        stride=(layer.stride[0], layer.stride[1]),
        padding=layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1]),
        dilation=(layer.dilation[0], layer.dilation[1]),
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        kind=spec.kind,
        rank=spec.rank,
        form=spec.form,
        tanh=spec.tanh,
        update=UpdateOptions.of(spec),
        init=init,
        initial_std=_rms(layer.weight) if init == "own" else None,
        name=spec.name,
    )


def _attention_like(
    layer: nn.MultiheadAttention, specs: Mapping[str, LayerSpec], init: Init
) -> tuple[nn.Module, dict[str, FactoredLayer]]:
    """Attention with factored projections; those without a spec stay dense, with the layer's values."""
    projections = {}
    for name in PROJECTIONS:
        value = _weight(layer, name)
        spec = specs.get(name) or choose_layer(name, tuple(value.shape), kind="dense").spec
        made = FactoredWeight(spec, initial_std=_rms(value), device=value.device, dtype=value.dtype, init=init)
        if spec.kind == "dense":
            made._parameters["weight"] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        projections[name] = made
    return MultiheadAttention(layer, projections), {name: projections[name] for name in specs}


def _recurrent_like(
    layer: nn.LSTM | nn.GRU, specs: Mapping[str, LayerSpec], init: Init
) -> tuple[nn.Module, dict[str, FactoredLayer]]:
    """Factored LSTM or GRU; weights without a spec stay dense, and they and all biases stay the same objects."""
    (weight, spec), *_ = specs.items()
    first = layer.get_parameter(weight)
    new = (LSTM if isinstance(layer, nn.LSTM) else GRU)(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        layer.batch_first,
        layer.dropout,
        layer.bidirectional,
        device=first.device,
        dtype=first.dtype,
        kind=spec.kind,
        rank={name: specs[name].rank if name in specs else 0 for name in weight_names(layer)},
        tanh=spec.tanh,
        update=UpdateOptions.of(spec),
        init=init,
        name=spec.name.removesuffix(weight).removesuffix("."),
    )
    weights = new.weights()
    for name, made in weights.items():
        if name not in specs:
            made._parameters["weight"] = layer._parameters[name]
        elif init == "own":
            made.initial_std = _rms(layer.get_parameter(name))
            made.reset_parameters()
    for name in layer._parameters:
        if name.startswith("bias"):
            new._parameters[name] = layer._parameters[name]
    return new, {name: weights[name] for name in specs}
