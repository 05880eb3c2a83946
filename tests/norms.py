"""How far tensors are from each other, in the Frobenius norm and double precision."""

import math

import numpy as np
from numpy.typing import ArrayLike


def norm(values: ArrayLike) -> float:
    """||values||_F."""
    return math.sqrt(np.square(values, dtype=np.float64).sum())  # np.linalg.norm would start threads


def relative_error(found: ArrayLike, expected: ArrayLike) -> float:
    """||found - expected||_F / ||expected||_F."""
    return norm(np.subtract(found, expected, dtype=np.float64)) / norm(expected)
