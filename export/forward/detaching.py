"""Values that have no gradient."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op


def detach(x: Any) -> Any:
    """`aten.detach`, in the form that `export.gradients` recognizes."""
    return op.Mean(x) if x.dtype is None or x.dtype.is_floating_point() else op.Identity(x)
