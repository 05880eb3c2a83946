"""Any layer of torch with one weight, on factors: its own forward pass, with the composed weight for its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from fedpara_edge.factors.factorization import Init
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.nn.counterparts import in_torch, parameter_of
from fedpara_edge.nn.layers import FactoredLayer


class Wrapped(FactoredLayer):
    """A layer whose weight is composed of factors, with the options and the forward pass of torch's.

    For layers without a factored class of their own: convolutions in one and three dimensions, grouped ones, transposed
    ones, ones with other paddings than zeros, and the `Conv1D` of transformers (`fedpara_edge.nn.counterparts`). Its
    attributes are those of the layer; `weight` is composed, in the layer's shape.

    Args:
        layer: Layer to take options and bias from; not modified.
        spec: Spec of the weight.
        init: Initialization of the factors.
        initial_std: Rms of a composed weight; He's standard deviation if None.

    >>> import torch
    >>> spec = LayerSpec(name="c", operator="conv2d", kind="fedpara", form="tensor", shape=(32, 16, 5, 1), rank=4)
    >>> layer = Wrapped(nn.Conv1d(16, 32, 5), spec)
    >>> layer(torch.ones(2, 16, 20)).shape, layer.weight.shape
    (torch.Size([2, 32, 16]), torch.Size([32, 16, 5]))
    """

    def __init__(
        self, layer: nn.Module, spec: LayerSpec, *, init: Init = "composed", initial_std: float | None = None
    ) -> None:
        weight = parameter_of(layer, "weight")
        assert weight is not None
        super().__init__(spec, bias=False, device=weight.device, dtype=weight.dtype, init=init, initial_std=initial_std)
        del self.bias
        self.register_parameter("bias", layer._parameters.get("bias"))
        # In __dict__, so that its parameters, which have no memory, are no parameters of the model.
        self.__dict__["_layer"] = copy.deepcopy(layer).to("meta")

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the layer computes with the composed weight."""
        named = {"weight": self.weight, "bias": self.bias}
        outputs: Tensor = functional_call(self._layer, {k: v for k, v in named.items() if v is not None}, inputs)
        return outputs

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__.get("_layer")
        if layer is None:
            return super().__getattr__(name)
        if name == "weight":
            return in_torch(layer, self.compose(), tuple(layer._parameters["weight"].shape))
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(layer, name)

    def extra_repr(self) -> str:
        return f"{type(self._layer).__name__}({self._layer.extra_repr()}), {super().extra_repr()}"
