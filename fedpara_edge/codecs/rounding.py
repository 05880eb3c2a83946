"""Rounding to integers: at random, exact in expectation, or to the nearest with a dead zone around zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def generator(seed: int) -> np.random.Generator:
    """Generator of the random numbers for one change; decoding does not depend on how they are drawn."""
    return np.random.Generator(np.random.SFC64(seed))


def round_randomly(values: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    """Random rounding ⌊v + u⌋ with u uniform in [0, 1), whose expectation is v."""
    moved = random.random(len(values), dtype=np.float32)
    moved += values
    np.floor(moved, out=moved)
    return moved


def round_to_nearest(values: NDArray[np.float32], zone: float | NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounding sign(v) ⌊|v| + 1 - zone⌋: to zero below `zone`, from 0.5 (to the nearest) to below 1.

    A wider zone costs a little precision and saves more bytes: most values are near zero, and zeros are cheap.
    """
    magnitudes = np.abs(values)
    magnitudes += np.subtract(1, zone, dtype=np.float32)
    np.floor(magnitudes, out=magnitudes)
    return np.copysign(magnitudes, values)
