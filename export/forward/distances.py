"""Distances between all pairs of rows."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op

from fedpara_edge.errors import InputError


def cdist(x: Any, y: Any, p: float = 2.0, compute_mode: int | None = None) -> Any:
    """`aten._cdist_forward`: distances [..., N, M] of rows [..., N, C] and [..., M, C]; gradients are 0 where they are.

    Raises:
        InputError: `p` is neither 1 nor 2.
    """
    del compute_mode
    difference = op.Sub(op.Unsqueeze(x, _ints(-2)), op.Unsqueeze(y, _ints(-3)))
    last = _ints(-1)
    if p == 1:
        return op.ReduceSum(op.Abs(difference), last, keepdims=0)
    if p != 2:
        raise InputError(f"torch.cdist: expected p of 1 or 2, found {p:g}; write it out")
    squared = op.ReduceSum(op.Mul(difference, difference), last, keepdims=0)
    zero, one = (op.Constant(value_float=value) for value in (0.0, 1.0))
    equal = op.Equal(squared, zero)
    return op.Where(equal, zero, op.Sqrt(op.Where(equal, one, squared)))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)
