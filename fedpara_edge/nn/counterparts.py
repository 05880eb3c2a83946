"""The weights of torch's layers, seen as the matrices and kernels that factors compose.

| layer                         | weight in torch        | factored as           | named                    |
|-------------------------------|------------------------|-----------------------|--------------------------|
| `Linear`, `Embedding`         | [O, I], [V, D]         | the same              | as the layer             |
| `Conv1d`, `Conv2d`, `Conv3d`  | [O, I/g, K1, K2, K3]   | [O, I/g, K1, K2 K3]   | as the layer             |
| `ConvTranspose1d` to `3d`     | [I, O/g, K1, K2, K3]   | [I, O/g, K1, K2 K3]   | as the layer             |
| `Conv1D` of transformers      | [I, O]                 | [O, I]                | as the layer             |
| `MultiheadAttention`          | [3 E, E]               | three of [E, E]       | `q_proj` and so on in it |
| `LSTM`, `GRU`                 | [G H, I], [G H, H]     | the same              | as the parameters in it  |

All g groups of a convolution share their factors. Factors of its own would save a group little, or nothing where it has
a single input channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

RECURRENT_TYPES = (nn.LSTM, nn.GRU)
WEIGHTED_TYPES = (nn.Linear, _ConvNd, nn.Embedding, nn.MultiheadAttention, *RECURRENT_TYPES)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Projections of attention: of queries, keys and values."""

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_EXACT_TYPES = (
    nn.Linear,
    NonDynamicallyQuantizableLinear,  # which behaves just as Linear does
    *_CONVOLUTIONS,
    nn.Embedding,
    nn.MultiheadAttention,
    *RECURRENT_TYPES,
)


def has_weights(module: nn.Module) -> bool:
    """Whether a module is one of the table's, or of a subclass."""
    return isinstance(module, WEIGHTED_TYPES) or is_transposed_linear(module)


def is_known(layer: nn.Module) -> bool:
    """Whether a module with weights is exactly one of the table's, which use their weights as described."""
    return type(layer) in _EXACT_TYPES or is_transposed_linear(layer)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is a `Conv1D` of transformers, a linear layer with weight [I, O]; told by its name alone."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def weight_names(layer: nn.Module) -> list[str]:
    """Names of the weights of a layer: `weight` for a layer that is named like its only one."""
    if isinstance(layer, nn.MultiheadAttention):
        return list(PROJECTIONS)
    if isinstance(layer, nn.RNNBase):
        names: list[str] = [name for group in layer._all_weights for name in group]
        return [name for name in names if name.startswith(("weight_ih", "weight_hh"))]
    return ["weight"]


def parameter_of(layer: nn.Module, name: str) -> nn.Parameter | None:
    """Parameter that holds a weight; None if there is none, as it is computed."""
    if isinstance(layer, nn.MultiheadAttention):
        name = "in_proj_weight" if layer._qkv_same_embed_dim else f"{name}_weight"
    return layer._parameters.get(name)


def weight_of(layer: nn.Module, name: str) -> Tensor | None:
    """A weight as it is factored, [O, I] or [O, I, K1, K2]: a view of its parameter.

    >>> tuple(weight_of(nn.Conv1d(3, 8, 5), "weight").shape)
    (8, 3, 5, 1)
    >>> tuple(weight_of(nn.MultiheadAttention(12, 2), "k_proj").shape)
    (12, 12)
    """
    weight = parameter_of(layer, name)
    if weight is None:
        return None
    if isinstance(layer, nn.MultiheadAttention) and layer._qkv_same_embed_dim:
        return weight.chunk(3)[PROJECTIONS.index(name)]
    if is_transposed_linear(layer):
        return weight.T
    if isinstance(layer, _ConvNd) and weight.dim() != 4:
        rows, columns, first, *others = weight.shape
        return weight.reshape(rows, columns, first, math.prod(others))
    return weight


def in_torch(layer: nn.Module, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The only weight of a layer, as it is factored, in the shape that the layer uses."""
    return weight.T if is_transposed_linear(layer) else weight.reshape(shape)


def unused_option(layer: nn.Module) -> str:
    """Option of a layer that its factored counterpart lacks; "" if there is none."""
    if isinstance(layer, nn.LSTM) and layer.proj_size:
        return f"projected state (proj_size={layer.proj_size})"
    if isinstance(layer, nn.Embedding):
        given: Mapping[str, object] = {
            "max_norm": layer.max_norm,
            "scale_grad_by_freq": layer.scale_grad_by_freq,
            "sparse": layer.sparse,
        }
        for name, value in given.items():
            if value:
                return f"{name}={value}"
        if layer.padding_idx is not None and bool(layer.weight[layer.padding_idx].any()):
            return f"row {layer.padding_idx}, of padding_idx, is not zero"
    return ""
