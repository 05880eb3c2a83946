"""`MultiheadAttention` with factored projections, in place of torch's.

The projections of queries, keys and values, of which torch has one weight, are three, in the modules `q_proj`, `k_proj`
and `v_proj`. The output projection `out_proj` is a linear layer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fedpara_edge.nn.counterparts import PROJECTIONS
from fedpara_edge.nn.layers import FactoredWeight

_WEIGHTS = {f"{name}_weight": name for name in PROJECTIONS}


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with composed projections; the forward pass is torch's for separate ones.

    Args:
        layer: Layer to take options, biases and output projection from; not modified.
        projections: Weights [E, E], [E, kdim] and [E, vdim] by name, `q_proj`, `k_proj` and `v_proj`.
    """

    def __init__(self, layer: nn.MultiheadAttention, projections: Mapping[str, FactoredWeight]) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= {**vars(layer), "_parameters": {**layer._parameters}, "_modules": {**layer._modules}}
        self._parameters["in_proj_weight"] = None
        self._qkv_same_embed_dim = False  # which keeps torch from its kernels for dense weights, too
        for weight, name in _WEIGHTS.items():
            del self._parameters[weight]
            self._modules[name] = projections[name]

    def __getattr__(self, name: str) -> Any:
        return self._modules[_WEIGHTS[name]]() if name in _WEIGHTS else super().__getattr__(name)  # type: ignore[misc]


def without_nested_tensors(model: nn.Module) -> None:
    """Keep encoders with factored attention from nested tensors, which attention takes with dense weights alone."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(inner, MultiheadAttention) for inner in module.modules()
        ):
            module.use_nested_tensor = False
