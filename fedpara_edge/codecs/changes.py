"""One chunk of the changes in several files, and weighted sums over the files.

A codec with scales keeps them apart from the integers: in a sum of weighted changes, Σ_f w_f s_fb q_fj for the entries
j of block b, the scales are multiplied into the weights, which saves one pass over the integers.

Products are cut into tiles because OpenBLAS splits larger ones among threads of its own, which busy-wait for each other
and lose much time when the cores have other work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

TILE_ENTRIES = 256
NORM_ENTRIES = 1 << 12
SQUARES = (1e-25, 1e37)
"""Range in which a sum of squares in float32 has lost nothing to underflow or overflow."""


@dataclass(frozen=True)
class BlockScales:
    """Scales by which the integers of each block are still to be multiplied.

    Args:
        scales: Scales, float32 [files, blocks].
        lengths: Block lengths in entries, which add up to the chunk's.
    """

    scales: NDArray[np.float32]
    lengths: NDArray[np.intp]

    def multiply(self, integers: NDArray[np.float32]) -> None:
        """Turn integers, float32 [files, entries], into changes, in place."""
        integers *= np.repeat(self.scales, self.lengths, axis=1)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scales of some entries, float32 [files, positions]."""
        return np.take(self.scales, np.searchsorted(np.cumsum(self.lengths), positions, side="right"), axis=1)


class Changes:
    """One chunk of the changes in several files.

    Args:
        matrix: Changes or integers, float32 [files, entries]; owned by this object from now on.
        scales: Scales of groups of consecutive rows that hold integers, each with the number of its first row.
    """

    def __init__(self, matrix: NDArray[np.float32], scales: Sequence[tuple[int, BlockScales]] = ()) -> None:
        self._matrix = matrix
        self._groups: list[tuple[slice, BlockScales | None]] = []
        done = 0
        for first, found in scales:
            last = first + len(found.scales)
            rows = slice(first, last)
            if done < first:
                self._groups.append((slice(done, first), None))
            if len(found.lengths) * TILE_ENTRIES > matrix.shape[1]:
                # One product per block would take longer where blocks are this short.
                found.multiply(matrix[rows])
                self._groups.append((rows, None))
            else:
                self._groups.append((rows, found))
            done = last
        if done < len(matrix):
            self._groups.append((slice(done, len(matrix)), None))

    @property
    def shape(self) -> tuple[int, int]:
        """Number of files and of entries."""
        files, entries = self._matrix.shape
        return files, entries

    def values(self) -> NDArray[np.float32]:
        """Changes as a writable array, float32 [files, entries]."""
        for number, (rows, scales) in enumerate(self._groups):
            if scales is not None:
                scales.multiply(self._matrix[rows])
                self._groups[number] = rows, None
        return self._matrix

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Changes of some entries, float32 [files, positions]."""
        # "clip" skips the bounds check, which takes a third of the time.
        found = np.take(self._matrix, positions, axis=1, mode="clip")
        for rows, scales in self._groups:
            if scales is not None:
                found[rows] *= scales.at(positions)
        return found

    def weighted_sums(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sums over the files, float32 [sums, entries], with weights, float32 [sums, files].

        With u = 2^-24, each entry is off by at most (files + 1) u Σ |w_i d_i|. The bits of a sum do not depend on the
        other sums asked for.
        """
        total = np.zeros((len(weights), self.shape[1]), np.float32)
        for row, sums in zip(weights, total, strict=True):
            for number, (rows, scales) in enumerate(self._groups):
                part = sums if number == 0 else np.empty_like(sums)
                share, lengths = row[rows, np.newaxis], np.array([len(sums)])
                if scales is not None:
                    share, lengths = share * scales.scales, scales.lengths
                _sum_blocks(share, self._matrix[rows], lengths, part)
                if number:
                    sums += part
        return total

    def squares(self) -> NDArray[np.float64]:
        """Sums of the squared changes of each file, float64 [files], with a relative error of at most 2^-12 or so."""
        total = np.zeros(len(self._matrix))
        for rows, scales in self._groups:
            if scales is None:
                total[rows] = _squares_of_tiles(self._matrix[rows])
            else:
                factors = np.square(scales.scales, dtype=np.float64)
                for first, start, count, length in _runs(scales.lengths):
                    blocks = self._matrix[rows, start : start + count * length].reshape(-1, count, length)
                    total[rows] += np.vecdot(factors[:, first : first + count], np.vecdot(blocks, blocks))
        return total


def _squares_of_tiles(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums of squares over the rows: tile by tile in float32, which the cache has, and in float64 where need be."""
    files, entries = matrix.shape
    tiled = entries - entries % NORM_ENTRIES
    tiles, rest = matrix[:, :tiled].reshape(files, -1, NORM_ENTRIES), matrix[:, tiled:]
    sums = np.vecdot(tiles, tiles).sum(axis=1, dtype=np.float64) + np.vecdot(rest, rest)
    for row in np.flatnonzero(~((sums >= SQUARES[0]) & (sums <= SQUARES[1]))):
        sums[row] = np.sum(np.square(matrix[row], dtype=np.float64))
    return np.asarray(sums)


def _sum_blocks(
    weights: NDArray[np.float32], matrix: NDArray[np.float32], lengths: NDArray[np.intp], out: NDArray[np.float32]
) -> None:
    """Write into `out` [entries] the sum over the files of a matrix [files, entries] times weights [files, blocks]."""
    by_block = np.ascontiguousarray(weights.T)[:, np.newaxis, np.newaxis]
    for first, start, count, length in _runs(lengths):
        stop = start + count * length
        blocks = matrix[:, start:stop].reshape(-1, count, length)
        sums = out[start:stop].reshape(count, length)
        tiled = length - length % TILE_ENTRIES
        for begin, end, tile in ((0, tiled, TILE_ENTRIES), (tiled, length, length - tiled)):
            if begin < end:
                tiles = blocks[:, :, begin:end].reshape(-1, count, (end - begin) // tile, tile)
                results = sums[:, begin:end].reshape(count, -1, 1, tile)
                np.matmul(by_block[first : first + count], tiles.transpose(1, 2, 0, 3), out=results)


def _runs(lengths: NDArray[np.intp]) -> Iterator[tuple[int, int, int, int]]:
    """Runs of blocks of equal length: (number of the first block, its first entry, number of blocks, their length)."""
    firsts = [0, *(np.flatnonzero(lengths[1:] != lengths[:-1]) + 1).tolist(), len(lengths)]
    start = 0
    for first, last in pairwise(firsts):
        length = int(lengths[first])
        yield first, start, last - first, length
        start += (last - first) * length
