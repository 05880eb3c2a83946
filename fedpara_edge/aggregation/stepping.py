"""The step of a server algorithm on a whole model, piece by piece, so that it needs little memory beside its result.

Statistics move by their mean change, whatever the algorithm, which keeps for them what it starts with.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.codecs.codec import flatten, in_order, unflatten
from fedpara_edge.factors.layout import STATISTICS, Layout


def take_step(
    algorithm: ServerAlgorithm,
    layout: Layout,
    means: NDArray[np.float64],
    kept: Mapping[str, Mapping[str, NDArray[np.float32]]],
    participation: float,
    *,
    effort: Effort = USUAL,
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Turn the mean change into the movement of the weights, in place, and return what the server keeps next.

    Args:
        algorithm: Server algorithm.
        layout: Layout of the model.
        means: Means that the algorithm asked for, float64 [means, entries]; the first becomes the movement.
        kept: Groups of the algorithm after the round before, by shared tensor; empty before the first round.
        participation: Share of all clients that are in the means.
        effort: Division of the work into pieces and threads.

    Returns:
        The groups, float32 by shared tensor; infinite where they are too large.
    """
    tensors = in_order(layout.shared)
    entries = means.shape[1]
    old = {group: flatten(tensors, kept[group]) for group in algorithm.groups if kept}
    new = {group: np.empty(entries, np.float32) for group in algorithm.groups}
    statistics = np.flatnonzero(np.repeat([t.part in STATISTICS for t in tensors], [t.size for t in tensors]))

    def step(start: int) -> None:
        piece = slice(start, min(start + effort.piece_entries, entries))
        before = {
            group: np.asarray(old[group][piece], np.float64)
            if old
            else np.full(piece.stop - piece.start, algorithm.start(group))
            for group in algorithm.groups
        }
        with np.errstate(over="ignore", invalid="ignore"):
            movement, after = algorithm.step(means[:, piece], before, participation)
            first, last = np.searchsorted(statistics, (piece.start, piece.stop))
            inside = statistics[first:last] - start
            movement[inside] = means[0, piece][inside]
            means[0, piece] = movement
            for group, values in after.items():
                new[group][piece] = values
                new[group][piece][inside] = before[group][inside]

    effort.each(step, range(0, entries, effort.piece_entries))
    return {group: unflatten(tensors, values) for group, values in new.items()}
