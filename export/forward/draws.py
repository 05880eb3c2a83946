"""Translations of draws that torch.onnx lacks."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op


def uniform(x: Any, low: float = 0.0, high: float = 1.0) -> Any:
    """`aten.uniform`: uniform numbers in the shape of x."""
    return op.RandomUniformLike(x, low=low, high=high)
