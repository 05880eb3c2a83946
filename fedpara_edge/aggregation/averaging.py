"""The mean of updates with bounds on each (`bounds`), in one pass over the files, or two if a bound on a norm binds.

Norms are known only when the values have been read. They are gathered on the way into the mean, and only if one of them
is too large, all files are read again, with the changes scaled as they are decoded: so the mean, the running statistics
and the gap see what counts and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.bounds import Bounds, typical
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.gap import Gap, GapEstimator
from fedpara_edge.aggregation.norms import NormMeter, sorts_of
from fedpara_edge.aggregation.result import Accepted
from fedpara_edge.aggregation.spread import SpreadOfMeans
from fedpara_edge.aggregation.stream import StreamedMean, Watcher, stream_mean
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.errors import FedparaError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Average:
    """The mean changes of some updates, and what counted of each.

    Args:
        updates: The updates, each with the change that counted.
        means: Means that the algorithm asked for, float64 [means, entries]; meaningless if anything was refused.
        refused: Errors of the updates that turned out bad while they were read, by their number.
        gap: Distance of the mean of the factors from that of the weights; None if no layer has factors that travel.
        shares: Shares of the updates in the first mean, float64 [updates].
        accepted: Facts about each update.
    """

    updates: Sequence[Update]
    means: NDArray[np.float64]
    refused: Mapping[int, FedparaError]
    gap: Gap | None
    shares: NDArray[np.float64]
    accepted: tuple[Accepted, ...]


def average(
    updates: Sequence[Update],
    weights: Weights,
    algorithm: ServerAlgorithm,
    *,
    weighting: Weighting,
    bounds: Bounds,
    on_progress: Callable[[int, int], None] | None,
    effort: Effort,
) -> Average:
    """Average updates.

    Args:
        updates: Closed updates, in canonical order.
        weights: Weights that they change.
        algorithm: Server algorithm, which says what means it needs.
        weighting: Weighting of the updates.
        bounds: Bounds on each of them.
        on_progress: Function that is called with the number of files read and of all.
        effort: Division of the work.
    """
    metrics = [update.header.metrics for update in updates]
    shares = bounds.shares([update.header.examples for update in updates], weighting)
    meter = NormMeter(weights.layout, len(updates))

    def stream(taken: Sequence[Update], *more: Watcher) -> tuple[StreamedMean, Gap | None]:
        gap = GapEstimator(weights.layout, weights.tensors, updates=len(taken))
        spread = SpreadOfMeans(weights.layout)
        streamed = stream_mean(
            taken,
            weights.layout.shared,
            shares=algorithm.shares(shares, metrics),
            watchers=(gap, spread, *more),
            on_progress=on_progress,
            effort=effort,
        )
        spread.add_to(streamed.means[0], weights.tensors)
        return streamed, gap.result(streamed.means[0])

    streamed, gap = stream(updates, meter)
    trained, statistics = meter.norms()
    respects = np.vstack([trained * algorithm.shares(np.ones(len(updates)), metrics), statistics])
    factors = np.stack([bounds.factors(respects[:-1]), bounds.factors(respects[-1:])])
    taken = updates
    if not streamed.refused and (factors < 1).any():
        taken = scale(updates, factors, weights.layout)
        streamed, gap = stream(taken)
    return Average(
        updates=taken,
        means=streamed.means,
        refused=streamed.refused,
        gap=gap,
        shares=shares,
        accepted=_describe(updates, shares, bounds, weighting, trained, respects, factors),
    )


def scale(updates: Sequence[Update], factors: NDArray[np.float64], layout: Layout) -> list[Update]:
    """The updates with their changes scaled.

    Args:
        updates: Closed updates.
        factors: Factors of trained tensors and of running statistics, float64 [2, updates].
        layout: Layout of the model.
    """
    runs = sorts_of(layout)
    return [
        update if (own == 1).all() else update.scaled([(start, stop, float(own[sort])) for start, stop, sort in runs])
        for update, own in zip(updates, factors.T, strict=True)
    ]


def _describe(
    updates: Sequence[Update],
    shares: NDArray[np.float64],
    bounds: Bounds,
    weighting: Weighting,
    norms: NDArray[np.float64],
    respects: NDArray[np.float64],
    factors: NDArray[np.float64],
) -> tuple[Accepted, ...]:
    examples = [update.header.examples for update in updates]
    counted = bounds.count(examples) if weighting == "examples" else examples
    unlimited = np.array(counted) / sum(counted) if weighting == "examples" else shares
    in_medians = np.max([row / typical(row) for row in respects], axis=0)
    return tuple(
        Accepted(
            path=update.path,
            client=update.header.client,
            examples=update.header.examples,
            steps=update.header.steps,
            metrics=update.header.metrics,
            bytes=update.file.size_bytes,
            share=float(shares[k]),
            norm=float(norms[k]),
            norm_in_medians=float(in_medians[k]) if np.isfinite(typical(norms)) else None,
            scale=float(factors[:, k].min()),
            bounded=tuple(
                name
                for name, binds in (
                    ("norm", factors[:, k].min() < 1),
                    ("examples", counted[k] < examples[k]),
                    ("share", shares[k] < unlimited[k]),
                )
                if binds
            ),
        )
        for k, update in enumerate(updates)
    )
