"""Variance of the clients' means around their own mean, which the mean of their variances leaves out.

Running statistics are those of a mixture: with μ = Σ_k s_k μ_k,

    σ² = Σ_k s_k (σ_k² + μ_k²) - μ² = Σ_k s_k σ_k² + Σ_k s_k (μ_k - μ)²

where the first sum is what any tensor gets, and the second depends on the changes of the means alone: it is
Σ_k s_k d_k² - (Σ_k s_k d_k)² with d_k = μ_k - base.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.stream import EntryWatcher
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.factors.layout import Layout, TensorSpec


class SpreadOfMeans(EntryWatcher):
    """Watcher that adds up the squares of the changes of running means (`stream.Watcher`).

    Args:
        layout: Layout of the model.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        super().__init__(running_means(layout))
        self._squares = np.zeros(len(self._positions))

    def finish_block(self, shares: NDArray[np.float64], thread: int, threads: int) -> None:
        """Add the squares of a block of updates up by `shares`, every `threads`-th entry."""
        own = slice(thread, None, threads)
        changes = self._changes[: len(shares), own].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            self._squares[own] += shares @ np.square(changes)

    def add_to(self, change: NDArray[np.float64], base: Mapping[str, NDArray[np.float32]]) -> None:
        """Add the spread to the changes of the running variances, in place (`add_spread`)."""
        add_spread(self._layout, self._squares, change, base)


def running_means(layout: Layout) -> NDArray[np.int64]:
    """Positions in a flat change of the running means that travel with a variance, ascending."""
    return np.concatenate([np.arange(0), *(_range(mean) for mean, _ in _pairs(layout))])


def add_spread(
    layout: Layout,
    squares: NDArray[np.float64],
    change: NDArray[np.float64],
    base: Mapping[str, NDArray[np.float32]],
) -> None:
    """Add the spread to the changes of the running variances, in place, and keep the variances from being negative.

    Args:
        layout: Layout of the model.
        squares: Means of the squared changes of running means, float64 [entries of `running_means`].
        change: Mean change of all updates, float64 [entries].
        base: Shared tensors that it changes, by name; a lossy codec may take a variance below zero.
    """
    offset = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for mean, variance in _pairs(layout):
            size = mean[1].size
            spread = squares[offset : offset + size] - np.square(change[mean[0] : mean[0] + size])
            moved = change[variance[0] : variance[0] + size]
            moved += np.maximum(spread, 0)
            np.maximum(moved, -base[variance[1].name].reshape(-1).astype(np.float64), out=moved)
            offset += size


Placed = tuple[int, TensorSpec]
"""A tensor, and the number of its first entry in a flat change."""


def _pairs(layout: Layout) -> list[tuple[Placed, Placed]]:
    """Running means that travel, each with the variance of the same layer, in the order of a flat change."""
    offset, placed = 0, dict[tuple[str, str], Placed]()
    for tensor in in_order(layout.shared):
        placed[tensor.layer, tensor.part] = offset, tensor
        offset += tensor.size
    return [
        (mean, placed[layer, "variance"])
        for (layer, part), mean in placed.items()
        if part == "mean" and (layer, "variance") in placed
    ]


def _range(placed: Placed) -> NDArray[np.intp]:
    return np.arange(placed[0], placed[0] + placed[1].size)
