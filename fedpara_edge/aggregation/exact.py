"""Exact sums of floating-point numbers with integer weights, which no order and no grouping changes by a bit.

    V = Σ_i n_i x_i = Σ_k a_k B^k,    B = 2^32

with integers a_k for the levels k that the numbers reach. Numbers are cut at the multiples of B^k into float64 slices
of at most 33 bits, and weights into limbs of 16 bits, so that up to `ROWS` products of these add up to no more than
2^53: BLAS makes such sums without rounding, on every machine. It is the splitting of Ozaki et al. 2012
(doi 10.1007/s11075-011-9478-1) on a grid that does not depend on the numbers, like the bins of Demmel and Nguyen 2015
(doi 10.1109/TC.2014.2345391).

*Digits* are the a_k with -2^31 <= a_k < 2^31, of which there is one choice. So sums of the same numbers have the same
digits, however they came about; sums add up, and what was added can be taken away again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.changes import TILE_ENTRIES

DIGIT_BITS = 32
LIMB_BITS = 16
ROWS = 32
"""Most slices that, times a limb each, add up to at most 2^53."""
CACHED_ENTRIES = 4096
"""Entries at a time, for the slices of a block of updates to stay in the cache."""
_CARRY_AFTER = 256
"""Additions, each below 2^54, after which the levels are brought back below 2^32."""


class ExactSum:
    """A vector of exact sums.

    Args:
        entries: Number of sums.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._levels: dict[int, NDArray[np.int64]] = {}
        self._additions = 0

    def add(self, values: NDArray[np.floating[Any]], weights: Sequence[int]) -> None:
        """Add the weighted rows of a matrix.

        Args:
            values: Finite numbers, [rows, entries].
            weights: Weight of each row.
        """
        for first in range(0, len(values), ROWS):
            limbs = _limbs(weights[first : first + ROWS])
            for start in range(0, self._entries, CACHED_ENTRIES):
                tile = slice(start, min(start + CACHED_ENTRIES, self._entries))
                self._add(tile, values[first : first + ROWS, tile].astype(np.float64), limbs)
            self._additions += len(limbs)
            if self._additions >= _CARRY_AFTER:
                self._carry()

    def _add(self, tile: slice, rest: NDArray[np.float64], limbs: NDArray[np.float64]) -> None:
        """Add the rows of a tile, float64 [rows, entries], overwritten, times limbs, float64 [limbs, rows]."""
        largest = max(float(rest.max()), -float(rest.min()), 0.0) if rest.size else 0.0
        level = (math.frexp(largest)[1] - 1) // DIGIT_BITS
        while largest:
            # Adding and subtracting this rounds to a multiple of B^level.
            grid = 1.5 * 2.0 ** (52 + DIGIT_BITS * level)
            high = rest + grid
            high -= grid
            rest -= high
            sums = _products(limbs, high)
            sums *= 2.0 ** (-DIGIT_BITS * level)
            for number, units in enumerate(sums.astype(np.int64)):
                self._deposit(level, tile, units, LIMB_BITS * number)
            if not np.vecdot(rest, rest).any():
                break
            level -= 1

    def _deposit(self, level: int, tile: slice, units: NDArray[np.int64], shift: int) -> None:
        """Add integers below 2^54, times B^level 2^shift."""
        level, shift = level + shift // DIGIT_BITS, shift % DIGIT_BITS
        if shift:
            low = units & ((1 << DIGIT_BITS - shift) - 1)
            self._level(level + 1)[tile] += (units - low) >> (DIGIT_BITS - shift)
            units = low << shift
        self._level(level)[tile] += units

    def _level(self, level: int) -> NDArray[np.int64]:
        found = self._levels.get(level)
        if found is None:
            found = self._levels[level] = np.zeros(self._entries, np.int64)
        return found

    def _carry(self) -> None:
        """Bring all levels into the range of digits, from the lowest on."""
        self._additions = 0
        level = min(self._levels, default=0)
        while self._levels and level <= max(self._levels):
            units = self._levels.get(level)
            if units is not None:
                carried = (units + (1 << DIGIT_BITS - 1)) >> DIGIT_BITS
                if carried.any():
                    units -= carried << DIGIT_BITS
                    self._level(level + 1)[:] += carried
            level += 1

    def add_digits(self, level: int, digits: NDArray[np.integer[Any]]) -> None:
        """Add the digits of a level of another sum, integers below 2^32 [entries]."""
        self._level(level)[:] += digits
        self._additions += 1
        if self._additions >= _CARRY_AFTER:
            self._carry()

    def digits(self) -> dict[int, NDArray[np.int64]]:
        """The digits by level, int64 [entries], without levels that are all 0; not to be changed."""
        self._carry()
        return {level: self._levels[level] for level in sorted(self._levels) if self._levels[level].any()}

    def to_float(self) -> NDArray[np.float64]:
        """The sums, float64 [entries], each off by at most 2^-51 of itself: a function of the digits alone."""
        total = np.zeros(self._entries)
        for level, digits in self.digits().items():
            total += digits * 2.0 ** (DIGIT_BITS * level)
        return total


def _products(limbs: NDArray[np.float64], slices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products of limbs [limbs, rows] and slices [rows, entries], cut as in `codecs.changes`, and for its reason."""
    products = np.empty((len(limbs), slices.shape[1]))
    tiled = slices.shape[1] - slices.shape[1] % TILE_ENTRIES
    for part in (slice(tiled), slice(tiled, None)):
        columns, out = slices[:, part], products[:, part]
        width = min(TILE_ENTRIES, columns.shape[1])
        if width:
            tiles = columns.reshape(len(columns), -1, width).transpose(1, 0, 2)
            np.matmul(limbs, tiles, out=out.reshape(len(out), -1, width).transpose(1, 0, 2))
    return products


def _limbs(weights: Sequence[int]) -> NDArray[np.float64]:
    """The limbs of weights, the lowest first, float64 [limbs, weights]; those of a negative one are negative."""
    count = max(1, *(-(-abs(weight).bit_length() // LIMB_BITS) for weight in weights))
    mask = (1 << LIMB_BITS) - 1
    return np.array(
        [
            [(abs(weight) >> LIMB_BITS * limb & mask) * (1 if weight > 0 else -1) for weight in weights]
            for limb in range(count)
        ],
        np.float64,
    )
