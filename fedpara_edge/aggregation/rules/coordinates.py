"""Rules for each entry on its own: the median of its values, and their mean without the extremes.

    median     the middle of the n values; the mean of the two in the middle of an even number
    trimmed    the mean of the values but for the f smallest and the f largest

A few columns at a time are laid out end to end in the cache, where numpy sorts each with vector instructions (AVX-512,
AVX2 or NEON). The mean of what is left is a product in float32: with m values it is off by at most (m + 1) u times the
largest of them, u = 2^-24.

Source: Yin et al. 2018, arXiv 1803.01498.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.rules.rule import Sorting, Vector, count_bad
from fedpara_edge.options import option

WIDTH = 1 << 9
"""Columns at a time."""
PADDING = 16
"""Entries between rows whose distance would otherwise be a power of two, which a cache has few places for."""


@dataclass(frozen=True, kw_only=True)
class Median(Sorting):
    """The median of each entry."""

    name = "median"

    def combine(self, rows: NDArray[np.float32]) -> Vector:
        """The middle, or the mean of the two in the middle."""
        return mean_of_ranks(rows, (len(rows) - 1) // 2, len(rows) // 2 + 1)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Sorting):
    """The mean of each entry without its extremes.

    Args:
        share: Share of the values that is left out at each end.
    """

    share: float = option(0.2, minimum=0, below=0.5, help="Share of the updates that is left out at each end.")

    name = "trimmed"

    def combine(self, rows: NDArray[np.float32]) -> Vector:
        """The mean of what is left."""
        cut = count_bad(self.share, len(rows))
        return mean_of_ranks(rows, cut, len(rows) - cut)


def mean_of_ranks(rows: NDArray[np.float32], first: int, last: int) -> Vector:
    """Mean of the values of ranks `first` to `last - 1` in each column, float64 [columns].

    >>> mean_of_ranks(np.array([[3.0, 1.0], [1.0, 1.0], [9.0, 4.0]], np.float32), 1, 3)
    array([6. , 2.5])
    """
    count, entries = rows.shape
    means = np.empty(entries)
    nearby = np.empty((count, WIDTH + PADDING), np.float32)
    columns = np.empty((WIDTH, count), np.float32)
    share = np.full(last - first, 1 / (last - first), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, entries, WIDTH):
            stop = min(start + WIDTH, entries)
            tile, ordered = nearby[:, : stop - start], columns[: stop - start]
            tile[:] = rows[:, start:stop]
            ordered[:] = tile.T
            ordered.sort(axis=1)
            means[start:stop] = ordered[:, first:last] @ share
    huge = ~np.isfinite(means)  # a sum beyond float32, which float64 holds
    means[huge] = np.sort(rows[:, huge], axis=0)[first:last].mean(axis=0, dtype=np.float64)
    return means
