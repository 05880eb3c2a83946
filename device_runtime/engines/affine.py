"""The affine term of an adjustment, as vectors that an engine multiplies by and adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from device_runtime.engines.protocol import NONE, Adjustment
from device_runtime.engines.vector import Vector, assign, views, zeros
from fedpara_edge.factors.layout import TensorSpec


@dataclass(frozen=True)
class Affine:
    """Vectors of the affine term μ w + h.

    Args:
        mu: Factor μ [P], or [1] if it is the same for all entries.
        h: Summand h [P]; None for zeros.
    """

    mu: Vector
    h: Vector | None


class AffineTerm:
    """Cache of the vectors of the latest adjustment, which is the same in all steps of a call.

    Args:
        tensors: All trained tensors, in the order of the vectors.
    """

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self._tensors = tensors
        self._adjustment = NONE
        self._vectors = Affine(np.zeros(1, np.float32), None)

    def vectors(self, adjustment: Adjustment) -> Affine:
        """Vectors of an adjustment.

        Raises:
            InputError: A tensor of the adjustment is not trained, or has another shape.
        """
        if adjustment is not self._adjustment:
            self._vectors = Affine(self._mu(adjustment), self._h(adjustment))
            self._adjustment = adjustment
        return self._vectors

    def _mu(self, adjustment: Adjustment) -> Vector:
        chosen = adjustment.mu_of
        if chosen is None or adjustment.mu == 0 or all(tensor.name in chosen for tensor in self._tensors):
            return np.full(1, adjustment.mu, np.float32)
        vector = zeros(self._tensors)
        shapes = {tensor.name: tensor.shape for tensor in self._tensors}
        assign(views(vector, self._tensors), {name: np.full(shapes.get(name, ()), adjustment.mu) for name in chosen})
        return vector

    def _h(self, adjustment: Adjustment) -> Vector | None:
        if adjustment.h is None:
            return None
        vector = zeros(self._tensors)
        assign(views(vector, self._tensors), adjustment.h)
        return vector
