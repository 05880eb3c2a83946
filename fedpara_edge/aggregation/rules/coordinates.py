"""Rules for each entry on its own: the median of its values, and their mean without the extremes.

    median     the middle of the n values; the mean of the two in the middle of an even number
    trimmed    the mean of the values but for the f smallest and the f largest

Values are sorted by a network of comparators (Batcher's odd-even merge sort) of which only those are done that the
result depends on: each is a minimum and a maximum of two rows, as wide as the cache has them, which is several times
faster than sorting column by column. Beyond `NETWORK` updates, numpy sorts.

Source: Yin et al. 2018, arXiv 1803.01498.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.rules.rule import Sorting, Vector, count_bad
from fedpara_edge.options import option

NETWORK = 256
WIDTH = 1 << 14


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
    total = np.empty(rows.shape[1])
    for start in range(0, rows.shape[1], WIDTH):
        part = rows[:, start : start + WIDTH]
        if len(rows) > NETWORK:
            part.sort(axis=0)
            ordered = list(part[first:last])
        else:
            ordered = _sort(list(part), first, last)[first:last]
        sums = total[start : start + WIDTH]
        sums[:] = 0
        for row in ordered:
            sums += row
        sums /= last - first
    return total


def _sort(rows: list[NDArray[np.float32]], first: int, last: int) -> list[NDArray[np.float32]]:
    spare = np.empty_like(rows[0])
    for low, high in comparators(len(rows), first, last):
        np.minimum(rows[low], rows[high], out=spare)
        np.maximum(rows[low], rows[high], out=rows[high])
        rows[low], spare = spare, rows[low]
    return rows


@cache
def comparators(count: int, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The comparators after which ranks `first` to `last - 1` of `count` values are in their places.

    >>> comparators(3, 1, 2)
    ((0, 1), (0, 2), (1, 2))
    """
    needed, kept = set(range(first, last)), list[tuple[int, int]]()
    for pair in reversed(list(_batcher(count))):
        if not needed.isdisjoint(pair):
            needed.update(pair)
            kept.append(pair)
    return tuple(reversed(kept))


def _batcher(count: int) -> Iterator[tuple[int, int]]:
    run = 1
    while run < count:
        step = run
        while step:
            for start in range(step % run, count - step, 2 * step):
                for low in range(start, min(start + step, count - step)):
                    if low // (2 * run) == (low + step) // (2 * run):
                        yield low, low + step
            step //= 2
        run *= 2
