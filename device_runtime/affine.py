"""The h of an adjustment as the vector that engines add."""

from __future__ import annotations

from collections.abc import Sequence

from device_runtime.engine import NONE, Adjustment
from device_runtime.vector import Vector, assign, views, zeros
from fedpara_edge.layout import TensorSpec


class Affine:
    """Makes it once for as long as the adjustment is the same, as it is in all steps of a call.

    Args:
        tensors: all trained tensors, in the order of the vector.
    """

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self._tensors = tensors
        self._adjustment = NONE
        self._h: Vector | None = None

    def vector(self, adjustment: Adjustment) -> Vector | None:
        """h [P], or None if the adjustment has none.

        Raises:
            InputError: a tensor of it is not trained, or has another shape.
        """
        if adjustment is not self._adjustment:
            h = None
            if adjustment.h is not None:
                h = zeros(self._tensors)
                assign(views(h, self._tensors), adjustment.h)
            self._adjustment, self._h = adjustment, h
        return self._h
