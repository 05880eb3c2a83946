"""Factored replacement of a torch layer: same operator, options, device, dtype and biases."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpara_edge.factors.factorization import Init
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.nn.fit import fit_factors
from fedpara_edge.nn.layers import Conv2d, FactoredLayer, Linear
from fedpara_edge.nn.recurrent import GRU, LSTM
from fedpara_edge.nn.selection import recurrent_weights


def factored_like(
    layer: nn.Module, specs: Mapping[str, LayerSpec], *, init: Init, pretrained: bool
) -> tuple[nn.Module, dict[str, float]]:
    """Layer that computes what `layer` does, with weights composed of factors.

    Args:
        layer: `nn.Linear`, `nn.Conv2d`, `nn.LSTM` or `nn.GRU`.
        specs: Specs of the weights to factor, by the weights' names in the layer.
        init: Initialization of the factors.
        pretrained: Whether to fit the factors to the weights and keep the bias, instead of drawing new factors and
            zeroing the bias.

    Returns:
        Factored layer, and the relative errors of the fits by the names of the specs.
    """
    if isinstance(layer, nn.LSTM | nn.GRU):
        return _recurrent_like(layer, specs, init=init, pretrained=pretrained)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    spec = specs["weight"]
    new = _linear_like(layer, spec, init) if isinstance(layer, nn.Linear) else _conv2d_like(layer, spec, init)
    errors = _fit(new, layer.weight) if pretrained else {}
    if not pretrained and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    new._parameters["bias"] = layer._parameters["bias"]  # the object itself, which may be tied or frozen
    return new.train(layer.training), errors


def _fit(layer: FactoredLayer, weight: Tensor) -> dict[str, float]:
    fit = fit_factors(layer.spec, weight)
    with torch.no_grad():
        for part, factor in layer.factors().items():
            factor.copy_(fit.factors[part])
    return {layer.spec.name: fit.relative_error}


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
        init=init,
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
        init=init,
        name=spec.name,
    )


def _recurrent_like(
    layer: nn.LSTM | nn.GRU, specs: Mapping[str, LayerSpec], *, init: Init, pretrained: bool
) -> tuple[nn.Module, dict[str, float]]:
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
        rank={name: specs[name].rank if name in specs else 0 for name in recurrent_weights(layer)},
        tanh=spec.tanh,
        init=init,
        name=spec.name.removesuffix(weight).removesuffix("."),
    )
    errors: dict[str, float] = {}
    for name, made in new.weights().items():
        if name not in specs:
            made._parameters["weight"] = layer._parameters[name]
        elif pretrained:
            errors |= _fit(made, layer.get_parameter(name))
    for name in layer._parameters:
        if name.startswith("bias"):
            new._parameters[name] = layer._parameters[name]
    return new.train(layer.training), errors
