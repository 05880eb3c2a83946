"""Randomized rotation: the Hadamard transform of blocks with random signs, which makes any values look Gaussian.

A block of n entries is cut, from its start, into pieces whose lengths are powers of four, always the largest that fits
and is allowed; fewer than 4 entries at its end stay as they are. A piece x of 4^j entries becomes y = 2^-j H S x, with
S the signs and H the Hadamard matrix in Sylvester's order, H[a, b] = (-1)^(number of ones in a AND b); the inverse is
x = S 2^-j H y. H is the Kronecker product of the matrix of size 2^j with itself: two products with that matrix, on
either side of the piece seen as a square.

The sign of entry i of the flat change is bit i % 64 of word i // 64 of SplitMix64 from a seed
(`fedpara_edge.factors.splitmix`). A set bit means minus. Rotation r = 0, 1, … of several takes its signs from the seed
plus r 2^32.

Decoding gives the same bits everywhere: H is applied to integers, or to integers times 2^-j, whose sums stay below 2^24
times their unit and are therefore exact in float32 in any order, and 2^-j is exact. For r rotations of integers up to L
that asks for L 2^((r + 1) j) of at most 2^24.

Source: Suresh et al., Distributed Mean Estimation with Limited Communication (arXiv 1611.00429), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.factors.splitmix import random_bytes

LONGEST = 1 << 16
"""Length of the longest piece where no other limit is given."""


@dataclass(frozen=True)
class Rotation:
    """Randomized rotations of the blocks of a flat change, one after the other.

    Args:
        seed: Seed of the signs, a uint32.
        rotations: Number of rotations.
        longest: Length of the longest piece, a power of four.
    """

    seed: int
    rotations: int = 1
    longest: int = LONGEST

    def rotate(self, values: NDArray[np.float32], lengths: NDArray[np.intp], start: int) -> NDArray[np.float32]:
        """Rotated entries [start, start + n) of the flat change, a new array, float32 [n].

        Args:
            values: Entries, float32 [n].
            lengths: Block lengths in entries, which add up to n.
            start: Number of the first entry in the flat change.
        """
        for number in range(self.rotations):
            values = values * self._signs(number, start, len(values))
            transform(values, lengths, self.longest)
        return values

    def rotate_back(self, rows: NDArray[np.float32], lengths: NDArray[np.intp], start: int) -> None:
        """Undo `rotate` in every row of entries, float32 [rows, n], in place."""
        for number in reversed(range(self.rotations)):
            for row in rows:
                transform(row, lengths, self.longest)
            rows *= self._signs(number, start, rows.shape[1])

    def _signs(self, number: int, start: int, count: int) -> NDArray[np.float32]:
        return signs(self.seed + (number << 32), start, count)


def transform(values: NDArray[np.float32], lengths: NDArray[np.intp], longest: int = LONGEST) -> None:
    """Multiply every piece of 4^j entries by 2^-j H, in place.

    Args:
        values: Entries, float32 [n], contiguous.
        lengths: Block lengths in entries, which add up to n.
        longest: Length of the longest piece, a power of four.

    >>> values = np.array([1, 0, 0, 0, 7], np.float32)
    >>> transform(values, np.array([5]))
    >>> values
    array([0.5, 0.5, 0.5, 0.5, 7. ], dtype=float32)
    """
    for exponent, starts in _pieces(lengths, longest):
        size = 4**exponent
        side = 2**exponent
        together = bool(np.all(np.diff(starts) == size))
        where = slice(int(starts[0]), int(starts[-1]) + size) if together else starts[:, None] + np.arange(size)
        squares = values[where].reshape(-1, side, side)
        transformed = _hadamard(side) @ squares @ _hadamard(side)
        transformed *= np.float32(2.0**-exponent)
        values[where] = transformed.reshape(-1) if together else transformed.reshape(-1, size)


def signs(seed: int, start: int, count: int) -> NDArray[np.float32]:
    """Signs of entries [start, start + count) of the flat change, float32 of -1 and 1.

    >>> signs(0, 0, 8).tolist()
    [-1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    """
    first, last = start // 64, -(-(start + count) // 64)
    bits = np.unpackbits(random_bytes(seed, first, last), bitorder="little")[start - 64 * first :][:count]
    return np.float32(1) - np.float32(2) * bits


def _pieces(lengths: NDArray[np.intp], longest: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Pieces grouped by size 4^exponent: (exponent, first entries of the pieces)."""
    rest = lengths.copy()
    position = np.cumsum(lengths) - lengths
    highest = min(int(lengths.max(initial=1)), longest).bit_length() // 2
    for exponent in range(highest, 0, -1):
        size = 4**exponent
        counts = rest // size
        if counts.any():
            # Pieces of a block lie end to end: the offset is the number of the piece in its block times its size.
            number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            yield exponent, np.repeat(position, counts) + size * number
        position += counts * size
        rest -= counts * size


@cache
def _hadamard(side: int) -> NDArray[np.float32]:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < side:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
