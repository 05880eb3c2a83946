"""Extrema along one axis, whose gradient goes to the entry that torch's index names."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op


def max_dim(x: Any, dim: int, keepdim: bool = False) -> Any:
    """`aten.max.dim`: first largest entries and their indices."""
    return _chosen(x, op.ArgMax(x, axis=dim), dim, keepdim)


def min_dim(x: Any, dim: int, keepdim: bool = False) -> Any:
    """`aten.min.dim`: first smallest entries and their indices."""
    return _chosen(x, op.ArgMin(x, axis=dim), dim, keepdim)


def _chosen(x: Any, indices: Any, dim: int, keepdim: bool) -> Any:
    values = op.GatherElements(x, indices, axis=dim)
    if keepdim:
        return values, indices
    axes: Any = op.Constant(value_ints=[dim])
    return op.Squeeze(values, axes), op.Squeeze(indices, axes)
