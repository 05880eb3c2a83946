"""Gaussian integers from a secret key: what SHAKE-256 makes of it, by Box and Muller's transform, rounded.

    w, v     64 bits each of SHAKE-256(key ‖ number of the piece)
    Z, Z'    sqrt(-2 ln((w + 1/2) / 2^64)) · cos, sin(2π v / 2^64)
    noise    round(RESOLUTION · Z), round(RESOLUTION · Z')

The same key gives the same noise, so that a round which is done again releases nothing new; another key gives one that
nobody can tell from an independent draw without breaking SHAKE-256.

How far this is from an ideal rounded Gaussian: Z is computed in float64, whose rounding, some 2^-50, moves the borders
between integers by less than 2^-28 of their distance; and it ends at 9.4 standard deviations, beyond which an ideal one
lies with a probability of 2^-64. The neighbours of an outcome are reached as it is, so that its low bits tell nothing.
An exact sampler (Canonne et al. 2020, arXiv 2004.00010) would remove what is left, at a hundred times the cost.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

PIECE_PAIRS = 1 << 15


def gaussian_integers(key: bytes, count: int, deviation: int) -> NDArray[np.float64]:
    """Independent Gaussian integers, float64 [count].

    Args:
        key: Secret key that decides them.
        count: Number of them.
        deviation: Standard deviation, at most 2^30.
    """
    noise = np.empty(count)
    for number, start in enumerate(range(0, count, 2 * PIECE_PAIRS)):
        part = noise[start : start + 2 * PIECE_PAIRS]
        stream = hashlib.shake_256(key + number.to_bytes(8, "little")).digest(16 * PIECE_PAIRS)
        words = np.frombuffer(stream, "<u8").astype(np.float64)
        radius = np.sqrt(-2 * np.log((words[:PIECE_PAIRS] + 0.5) / 2.0**64))
        angle = words[PIECE_PAIRS:] * (2 * np.pi / 2.0**64)
        part[:] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: len(part)]
    return np.rint(noise * deviation)
