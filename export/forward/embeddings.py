"""Embeddings whose rows of padding have no gradient, and bags of embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import opset18 as op

from export.forward.detaching import detach

_SUM, _MEAN, _MAX = range(3)
_LOWEST = float(np.finfo(np.float32).min)


def embedding(
    weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """`aten.embedding`: rows of the weight; that of padding gets no gradient."""
    _refuse_options(scale_grad_by_freq, sparse)
    rows = op.Gather(weight, indices)
    if padding_idx < 0:
        return rows
    return op.Where(_is_padding(indices, padding_idx), detach(rows), rows)


def embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """`aten.embedding_bag`: sum, mean or largest entries of the rows of each bag, without those of padding.

    All bags must have the same number of indices, as they have for indices [N, L], where torch makes the offsets.

    Raises:
        NotImplementedError: The offsets are the model's own, or an option has no counterpart in ONNX.
    """
    _refuse_options(scale_grad_by_freq, sparse)
    y = _bags(weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx)
    return y, *(op.Identity(offsets) for _ in range(3))  # what only torch's own backward pass reads


def _bags(
    weight: Any,
    indices: Any,
    offsets: Any,
    mode: int,
    per_sample_weights: Any,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Any:
    maker = offsets.producer()
    if include_last_offset or maker is None or maker.op_type != "Range":
        raise NotImplementedError("an EmbeddingBag with offsets; give it its indices as [batch, length]")
    bags = op.Concat(op.Shape(offsets), _ints(-1), axis=0)
    indices = op.Reshape(indices, bags)
    rows = op.Gather(weight, indices)
    if per_sample_weights is not None:
        rows = op.Mul(rows, op.Unsqueeze(op.Reshape(per_sample_weights, bags), _ints(-1)))
    if padding_idx is None or padding_idx < 0:
        return _reduced(rows, mode)
    padding = _is_padding(indices, padding_idx)
    fill: Any = op.Constant(value_float=_LOWEST if mode == _MAX else 0.0)
    kept: Any = op.Cast(op.Not(padding), to=1)
    count = op.ReduceSum(kept, _ints(1), keepdims=0)
    rows = op.Where(padding, fill, rows)
    if mode == _MEAN:
        return op.Div(op.ReduceSum(rows, _ints(1), keepdims=0), op.Max(count, _float(1.0)))
    return op.Where(op.Greater(count, _float(0.0)), _reduced(rows, mode), _float(0.0))


def _reduced(rows: Any, mode: int) -> Any:
    """Rows [N, L, D] reduced to [N, D]; of equal entries, the first is the largest."""
    if mode == _MAX:
        chosen = op.GatherElements(rows, op.ArgMax(rows, axis=1), axis=1)
        return op.Squeeze(chosen, _ints(1))
    reduce = op.ReduceMean if mode == _MEAN else op.ReduceSum
    return reduce(rows, _ints(1), keepdims=0)


def _is_padding(indices: Any, padding_idx: int) -> Any:
    """Whether an index is that of padding, with an axis of size 1 for the entries of a row."""
    number: Any = op.Constant(value_int=padding_idx)
    return op.Unsqueeze(op.Equal(indices, op.CastLike(number, indices)), _ints(-1))


def _refuse_options(scale_grad_by_freq: bool, sparse: bool) -> None:
    if scale_grad_by_freq or sparse:
        option = "scale_grad_by_freq" if scale_grad_by_freq else "sparse"
        raise NotImplementedError(f"an embedding with {option}, which has no counterpart in ONNX")


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _float(value: float) -> Any:
    return op.Constant(value_float=value)
