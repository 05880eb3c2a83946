"""Squeezing that keeps the batch, even one of a single row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxscript import opset18 as op


def squeeze(x: Any, axes: int | Sequence[int] | None = None) -> Any:
    """`aten.squeeze` of all axes, one, or some: of those whose size is 1 at tracing, so never of the batch."""
    count = len(x.shape)
    given = range(count) if axes is None else [axes] if isinstance(axes, int) else axes
    gone = [axis for axis in sorted({axis % count for axis in given if count}) if x.shape[axis] == 1]
    if not gone:
        return op.Identity(x)
    named: Any = op.Constant(value_ints=gone)
    return op.Squeeze(x, named)
