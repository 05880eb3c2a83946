"""Scales of blocks: the factors by which stored integers are multiplied, in two bytes each.

A scale is stored as bfloat16, the upper half of a float32 (sign, 8 bits of exponent, 7 of mantissa), little-endian. It
is zero for a block of zeros and otherwise from 2⁻¹⁰⁰ to 2¹⁰⁰, so that a decoded value, an integer below 2²⁴ times a
scale, is always a normal float32 (one rounding, the same on every processor) and never infinite.
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
    """Smallest storable scales that are not below the given ones.

    Args:
        scales: Scales, float [blocks], from 0 to `LARGEST`.

    Returns:
        Storable scales, float32 [blocks], each a bfloat16.

    >>> round_up(np.array([0.0, 1.0, 1.001, 1e-40])).tolist()
    [0.0, 1.0, 1.0078125, 7.888609052210118e-31]
    """
    floored = np.where(scales > 0, np.maximum(scales, SMALLEST), 0).astype(np.float32)
    raised = (floored.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return raised.view(np.float32)


def round_at_random(scales: NDArray[np.floating], random: np.random.Generator) -> NDArray[np.float32]:
    """Storable scales, each one of the two beside the given one, which is their expectation.

    Args:
        scales: Scales, float [blocks], from `SMALLEST` to `LARGEST`.
        random: Generator of one uint16 for each.

    Returns:
        Storable scales, float32 [blocks], each a bfloat16.
    """
    raised = scales.astype(np.float32).view(np.uint32) + random.integers(1 << 16, size=len(scales), dtype=np.uint32)
    storable: NDArray[np.float32] = (raised & np.uint32(0xFFFF0000)).view(np.float32)
    return storable


def round_down(scale: float) -> np.float32:
    """Largest storable scale that is not above the given one; 0 below `SMALLEST`.

    >>> round_down(1.001), round_down(1e-40)
    (np.float32(1.0), np.float32(0.0))
    """
    bits = np.float32(scale if scale >= SMALLEST else 0).view(np.uint32) & np.uint32(0xFFFF0000)
    found: np.float32 = bits.view(np.float32)
    return found


def to_bytes(scales: NDArray[np.float32]) -> bytes:
    """Stored form of scales that `round_up` returned."""
    return (scales.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()


def from_bytes(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scales, float32 [..., blocks], from 2 bytes each.

    Raises:
        DamageError: A scale is out of range, NaN or infinite.
    """
    bits = stored.view("<u2")
    scales = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    # Positive bfloat16 values sort like their bits; those below the smallest wrap around to the top.
    outside = (bits - _SMALLEST_BITS) > _LARGEST_BITS - _SMALLEST_BITS
    if outside.any():
        bad = np.flatnonzero(outside & (bits != 0))
        if bad.size:
            found, block = scales.flat[bad[0]], int(bad[0]) % scales.shape[-1]
            raise DamageError(f"scales of 0 or from 2^-100 to 2^100, found {found:g}", block=block)
    return scales


def check_range(tensors: Sequence[TensorSpec], change: NDArray[np.float32], max_magnitude: float = LARGEST) -> None:
    """Raise if a change is too large for a codec to express, as no converging training makes it.

    Args:
        tensors: Shared tensors, in the order of the flat change.
        change: Flat change, float32 [entries].
        max_magnitude: Largest magnitude that the codec can express.

    Raises:
        DivergedError: An entry is larger.
    """
    bad = np.flatnonzero(np.abs(change) > max_magnitude)
    if bad.size:
        raise DivergedError(
            f"tensor {name_at(tensors, int(bad[0]))!r}: expected a change of at most {max_magnitude:g}, found "
            f"{change[bad[0]]:g}: the training diverged; lower the learning rate"
        )
