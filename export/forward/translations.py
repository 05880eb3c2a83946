"""ONNX translations of PyTorch operators whose usual translation onnxruntime-training can't differentiate.

onnxruntime-training 1.19.2 has no gradient for InstanceNormalization (the usual GroupNorm), HardSwish, HardSigmoid,
Mish, Softplus, Elu or Clip, a broken one for AveragePool (`pooling`), and differentiates LayerNormalization only with
scale, bias and all three outputs. Each function here has the signature of the ATen operator it stands for and is traced
by `torch.onnx.export`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from onnxscript import opset18 as op

from export.forward.batchnorm import with_statistics, without_statistics
from export.forward.detaching import detach
from export.forward.distances import cdist
from export.forward.draws import uniform
from export.forward.embeddings import embedding, embedding_bag
from export.forward.extrema import max_dim, min_dim
from export.forward.pooling import adaptive_avg_pool, adaptive_max_pool, avg_pool, max_pool
from export.forward.squeezing import squeeze


def layer_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    """`aten.layer_norm`, with scale, bias and all outputs written out."""
    shape = list(normalized_shape)
    if math.prod(shape) <= _SHARED_ENTRIES and (weight is None or bias is None):
        return _layer_norm_by_steps(x, shape, weight, bias, eps)
    scale = _filled(1.0, shape) if weight is None else weight
    shift = _filled(0.0, shape) if bias is None else bias
    outputs: Any = op.LayerNormalization(x, scale, shift, axis=-len(shape), epsilon=eps)
    return outputs[0]


_SHARED_ENTRIES = 8
"""Largest size of equal constants that onnxruntime-training merges into one, with a gradient then defined twice."""


def _layer_norm_by_steps(x: Any, shape: list[int], weight: Any, bias: Any, eps: float) -> Any:
    axes = _ints(range(-len(shape), 0))
    centred = op.Sub(x, op.ReduceMean(x, axes))
    variance = op.ReduceMean(op.Mul(centred, centred), axes)
    y = op.Div(centred, op.Sqrt(op.Add(variance, _float(eps))))
    y = y if weight is None else op.Mul(y, weight)
    return y if bias is None else op.Add(y, bias)


def group_norm(x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    """`aten.group_norm`: LayerNormalization of each group, then the affine map of each channel."""
    channels, spatial = int(x.shape[1]), [int(size) for size in x.shape[2:]]
    size = channels // num_groups * math.prod(spatial)
    groups = op.Reshape(x, _ints([0, num_groups, size]))
    y = op.Reshape(layer_norm(groups, [size], eps=eps), _ints([0, channels, *spatial]))
    by_channel = _ints([channels] + [1] * len(spatial))
    if weight is not None:
        y = op.Mul(y, op.Reshape(weight, by_channel))
    if bias is not None:
        y = op.Add(y, op.Reshape(bias, by_channel))
    return y


def relu6(x: Any) -> Any:
    """`aten.relu6`: min(max(x, 0), 6) = relu(x) - relu(x - 6)."""
    return op.Sub(op.Relu(x), op.Relu(op.Sub(x, _float(6.0))))


def hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    """`aten.hardtanh`: relu(x - min) + min, up to max; at min the gradient is 0, as in torch, where Clip's own is 1."""
    if not min_val:
        return op.Clip(op.Relu(x), None, _float(max_val))
    return op.Clip(op.Add(op.Relu(op.Sub(x, _float(min_val))), _float(min_val)), None, _float(max_val))


def hardsigmoid(x: Any) -> Any:
    """`aten.hardsigmoid`: relu6(x + 3) / 6."""
    return op.Mul(relu6(op.Add(x, _float(3.0))), _float(1 / 6))


def hardswish(x: Any) -> Any:
    """`aten.hardswish`: x · hardsigmoid(x)."""
    return op.Mul(x, hardsigmoid(x))


def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """`aten.softplus`: (relu(βx) + log(1 + exp(-|βx|))) / β, which needs no threshold."""
    del threshold
    z = op.Mul(x, _float(beta))
    tail = op.Log(op.Add(op.Exp(op.Neg(op.Abs(z))), _float(1.0)))
    return op.Mul(op.Add(op.Relu(z), tail), _float(1 / beta))


def mish(x: Any) -> Any:
    """`aten.mish`: x · tanh(softplus(x))."""
    return op.Mul(x, op.Tanh(softplus(x)))


def elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    """`aten.elu`: scale (relu(x) + α (exp(-relu(-x input_scale)) - 1))."""
    negative = op.Relu(op.Mul(x, _float(-input_scale)))
    curve = op.Mul(op.Sub(op.Exp(op.Neg(negative)), _float(1.0)), _float(alpha))
    return op.Mul(op.Add(op.Relu(x), curve), _float(scale))


def selu(x: Any) -> Any:
    """`aten.selu`: elu with its two constants."""
    return elu(x, 1.6732632423543772, 1.0507009873554805)


def celu(x: Any, alpha: float = 1.0) -> Any:
    """`aten.celu`: relu(x) + α (exp(-relu(-x) / α) - 1)."""
    return elu(x, alpha, 1.0, 1 / alpha)


def instance_norm(x: Any, weight: Any = None, bias: Any = None, mean: Any = None, var: Any = None, *rest: Any) -> Any:
    """`aten.instance_norm`: a GroupNorm with as many groups as channels; running statistics are not used."""
    del mean, var
    _, _, eps, _ = rest
    return group_norm(x, int(x.shape[1]), weight, bias, eps)


def split(x: Any, sizes: int | Sequence[int], dim: int = 0) -> Any:
    """`aten.split` and `aten.split_with_sizes`: a Slice for each part, not a sequence, which has no gradient."""
    length = x.shape[dim]
    if not isinstance(length, int):
        return op.SplitToSequence(x, op.Constant(value_int=sizes) if isinstance(sizes, int) else _ints(sizes), axis=dim)
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    ends = list(itertools.accumulate(sizes))
    return [op.Slice(x, _ints([end - size]), _ints([end]), _ints([dim])) for size, end in zip(sizes, ends, strict=True)]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.layer_norm.default: layer_norm,
    torch.ops.aten.group_norm.default: group_norm,
    torch.ops.aten.relu6.default: relu6,
    torch.ops.aten.hardsigmoid.default: hardsigmoid,
    torch.ops.aten.hardtanh.default: hardtanh,
    torch.ops.aten.hardswish.default: hardswish,
    torch.ops.aten.softplus.default: softplus,
    torch.ops.aten.mish.default: mish,
    torch.ops.aten.elu.default: elu,
    torch.ops.aten.selu.default: selu,
    torch.ops.aten.celu.default: celu,
    torch.ops.aten.instance_norm.default: instance_norm,
    torch.ops.aten.split.Tensor: split,
    torch.ops.aten.split_with_sizes.default: split,
    torch.ops.aten.unsafe_split.Tensor: split,
    torch.ops.aten.unsafe_split_with_sizes.default: split,
    torch.ops.aten.detach.default: detach,
    torch.ops.aten.squeeze.default: squeeze,
    torch.ops.aten.squeeze.dim: squeeze,
    torch.ops.aten.squeeze.dims: squeeze,
    torch.ops.aten._native_batch_norm_legit.no_stats: without_statistics,
    torch.ops.aten._native_batch_norm_legit_functional.default: with_statistics,
    torch.ops.aten.uniform.default: uniform,
    torch.ops.aten.embedding.default: embedding,
    torch.ops.aten.embedding_bag.default: embedding_bag,
    torch.ops.aten.embedding_bag.padding_idx: embedding_bag,
    torch.ops.aten._cdist_forward.default: cdist,
    torch.ops.aten.max.dim: max_dim,
    torch.ops.aten.min.dim: min_dim,
    torch.ops.aten.avg_pool1d.default: avg_pool(1),
    torch.ops.aten.avg_pool2d.default: avg_pool(2),
    torch.ops.aten.avg_pool3d.default: avg_pool(3),
    torch.ops.aten.adaptive_avg_pool1d.default: adaptive_avg_pool(1),
    torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool(2),
    torch.ops.aten.adaptive_avg_pool3d.default: adaptive_avg_pool(3),
    torch.ops.aten.max_pool1d.default: max_pool(1),
    torch.ops.aten.max_pool2d.default: max_pool(2),
    torch.ops.aten.max_pool3d.default: max_pool(3),
    torch.ops.aten.adaptive_max_pool1d.default: adaptive_max_pool(1),
    torch.ops.aten.adaptive_max_pool2d.default: adaptive_max_pool(2),
    torch.ops.aten.adaptive_max_pool3d.default: adaptive_max_pool(3),
}


def _ints(values: Sequence[int]) -> Any:
    return op.Constant(value_ints=list(values))


def _float(value: float) -> Any:
    return op.Constant(value_float=value)


def _filled(value: float, shape: Sequence[int]) -> Any:
    """Constant with all its entries: made by Expand, equal ones would be merged, and their gradients defined twice."""
    return op.Constant(value=numpy_helper.from_array(np.full(shape, value, np.float32)))
