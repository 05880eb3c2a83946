"""Scales of blocks: what a stored integer is multiplied with, in two bytes.

A scale is stored as bfloat16, the upper half of a float32 (sign, 8 bits of exponent, 7 of mantissa), little-endian. It
is zero, for a block of zeros, or from 2⁻¹⁰⁰ to 2¹⁰⁰: so a decoded value, an integer below 2²⁴ times a scale, is always
a normal float32 (one rounding, the same on every processor) and never infinite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.codec import name_at
from fedpara_edge.codecs.section import DamageError
from fedpara_edge.errors import DivergedError
from fedpara_edge.factors.layout import TensorSpec

SMALLEST, LARGEST = 2.0**-100, 2.0**100
_SMALLEST_BITS, _LARGEST_BITS = np.uint16((127 - 100) << 7), np.uint16((127 + 100) << 7)


def round_up(scales: NDArray[np.floating]) -> NDArray[np.float32]:
    """The smallest storable scales that are not below these.

    Args:
        scales: float [blocks], from 0 to `LARGEST`.

    Returns:
        float32 [blocks], each a bfloat16.

    >>> round_up(np.array([0.0, 1.0, 1.001, 1e-40])).tolist()
    [0.0, 1.0, 1.0078125, 7.888609052210118e-31]
    """
    floored = np.where(scales > 0, np.maximum(scales, SMALLEST), 0).astype(np.float32)
    raised = (floored.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return raised.view(np.float32)


def round_down(scale: float) -> np.float32:
    """The largest storable scale that is not above this one; 0 below `SMALLEST`.

    >>> round_down(1.001), round_down(1e-40)
    (np.float32(1.0), np.float32(0.0))
    """
    bits = np.float32(scale if scale >= SMALLEST else 0).view(np.uint32) & np.uint32(0xFFFF0000)
    found: np.float32 = bits.view(np.float32)
    return found


def to_bytes(scales: NDArray[np.float32]) -> bytes:
    """The stored form of scales that `round_up` returned."""
    return (scales.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()


def from_bytes(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The scales, float32 [..., blocks], of 2 bytes each.

    Raises:
        DamageError: one is out of range, NaN or infinite.
    """
    bits = stored.view("<u2")
    scales = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    # Positive bfloat16 are in the order of their bits; what is below the smallest wraps around to the top.
    outside = (bits - _SMALLEST_BITS) > _LARGEST_BITS - _SMALLEST_BITS
    if outside.any():
        bad = np.flatnonzero(outside & (bits != 0))
        if bad.size:
            found, block = scales.flat[bad[0]], int(bad[0]) % scales.shape[-1]
            raise DamageError(f"scales of 0 or from 2^-100 to 2^100, found {found:g}", block=block)
    return scales


def check_range(tensors: Sequence[TensorSpec], change: NDArray[np.float32], most: float = LARGEST) -> None:
    """Raise if a change is too large to be expressed, which that of no training that converges is.

    Args:
        tensors: the shared tensors, sorted by name.
        change: float32 [entries].
        most: largest magnitude there may be.

    Raises:
        DivergedError: it is.
    """
    bad = np.flatnonzero(np.abs(change) > most)
    if bad.size:
        raise DivergedError(
            f"tensor {name_at(tensors, int(bad[0]))!r}: expected a change of at most {most:g}, found "
            f"{change[bad[0]]:g}: the training diverged; lower the learning rate"
        )
