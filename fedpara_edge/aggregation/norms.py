"""Norms of the changes, gathered while they stream by.

The entries are of two sorts, those that gradients change and running statistics, each with a norm of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.changes import Changes
from fedpara_edge.codecs.codec import chunks, in_order
from fedpara_edge.factors.layout import STATISTICS, Layout

Runs = Sequence[tuple[int, int, int]]
"""Ranges of a flat change, each (start, stop, sort), which cover it in order."""


def sorts_of(layout: Layout) -> Runs:
    """The runs of entries of one sort, 0 for trained tensors and 1 for running statistics."""
    tensors = in_order(layout.shared)
    ends = np.cumsum([tensor.size for tensor in tensors], dtype=np.int64)
    sorts = np.array([tensor.part in STATISTICS for tensor in tensors], np.int64)
    last = np.flatnonzero(np.append(sorts[1:] != sorts[:-1], True)) if tensors else np.arange(0)
    bounds = [0, *ends[last].tolist()]
    return [(start, stop, int(sorts[k])) for (start, stop), k in zip(pairwise(bounds), last, strict=True)]


class NormMeter:
    """A `stream.Watcher` that gathers the norms of all changes.

    Args:
        layout: Layout of the model.
        updates: Number of updates to come.
        exact: Whether norms are off by no more than float64's rounding, and the same on any machine; slower.
    """

    def __init__(self, layout: Layout, updates: int, *, exact: bool = False) -> None:
        self._runs, self._squares_of = sorts_of(layout), _in_float64 if exact else Changes.squares
        # A sum for each chunk, added up at the end in their order: threads finish in any.
        self._starts = [start for start, _ in chunks(layout.shared_parameters)]
        self._squares = np.zeros((2, updates, len(self._starts)))
        self._first = self._stop = 0

    def start_block(self, files: int) -> None:
        """Expect the next `files` updates."""
        self._first, self._stop = self._stop, self._stop + files

    def collect(self, start: int, changes: Changes) -> None:
        """Add up the squares of a piece of the flat changes, from entry `start` on."""
        self.add(start, changes)

    def add(self, start: int, changes: Changes) -> NDArray[np.float64]:
        """As `collect`; the sums of squares of the piece, float64 [files], NaN or infinite where a value is."""
        chunk, rows = bisect_right(self._starts, start) - 1, slice(self._first, self._stop)
        stop = start + changes.shape[1]
        runs = [run for run in self._runs if run[0] < stop and run[1] > start]
        if len(runs) == 1:
            squares = self._squares_of(changes)
            self._squares[runs[0][2], rows, chunk] += squares
            return squares
        values, total = changes.values(), np.zeros(changes.shape[0])
        for first, last, sort in runs:
            part = Changes(values[:, max(first - start, 0) : last - start])
            squares = self._squares_of(part)
            self._squares[sort, rows, chunk] += squares
            total += squares
        return total

    def finish_block(self, shares: NDArray[np.float64], thread: int, threads: int) -> None:
        """Nothing: a piece is done when it was collected."""

    def norms(self) -> NDArray[np.float64]:
        """Norms, float64 [sorts, updates]."""
        return np.asarray(np.sqrt(self._squares.sum(axis=2)))


def _in_float64(changes: Changes) -> NDArray[np.float64]:
    """Sums of the squared changes of each file, float64 [files], of which each is a function of its row alone."""
    return np.array([np.square(row, dtype=np.float64).sum() for row in changes.values()])
