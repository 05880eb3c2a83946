"""The combination of updates with bounds on each (`bounds`): their mean, or what a robust rule makes of them (`rules`).

Norms are known only when the values have been read. For the plain mean they are gathered on the way into it, and only
if one of them is too large, all files are read again, with the changes scaled as they are decoded: so the mean, the
running statistics and the gap see what counts and nothing else. A rule that measures distances reads all files once for
these and once for the mean with its weights; one that sorts reads them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.bounds import Bounds, typical
from fedpara_edge.aggregation.contribution import Contribution, factors_of
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.gap import Gap, GapEstimator
from fedpara_edge.aggregation.norms import NormMeter, sorts_of
from fedpara_edge.aggregation.result import Accepted
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.aggregation.rules.rule import Sorting
from fedpara_edge.aggregation.spread import SpreadOfMeans
from fedpara_edge.aggregation.stream import StreamedMean, Watcher, stream_mean
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.errors import FedparaError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.update import Update, UpdateHeader
from fedpara_edge.formats.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Average:
    """The combined changes of some updates, and what counted of each.

    Args:
        updates: The updates, each with the change that counted.
        means: Means that the algorithm asked for, float64 [means, entries]; meaningless if anything was refused.
        refused: Errors of the updates that turned out bad while they were read, by their number.
        gap: Distance of the mean of the factors from that of the weights; None if no layer has factors that travel, or
            the rule has no mean.
        weights: Weights of the updates in the first mean, float64 [updates].
        accepted: Facts about each update.
    """

    updates: Sequence[Update]
    means: NDArray[np.float64]
    refused: Mapping[int, FedparaError]
    gap: Gap | None
    weights: NDArray[np.float64]
    accepted: tuple[Accepted, ...]


def average(
    updates: Sequence[Update],
    weights: Weights,
    algorithm: ServerAlgorithm,
    *,
    weighting: Weighting,
    bounds: Bounds,
    method: Method,
    on_progress: Callable[[int, int], None] | None,
    effort: Effort,
) -> Average:
    """Combine updates.

    Args:
        updates: Closed updates, in canonical order.
        weights: Weights that they change.
        algorithm: Server algorithm, which says what means it needs.
        weighting: Weighting of the updates.
        bounds: Bounds on each of them.
        method: Rule that combines them.
        on_progress: Function that is called with the number of files read and of all.
        effort: Division of the work.
    """
    shares = bounds.shares([update.header.examples for update in updates], weighting)
    passes = _Passes(updates, weights, algorithm, bounds, on_progress, effort)
    gram, refused = np.zeros((len(updates), len(updates))), dict[int, FedparaError]()
    if method.measures:
        gram, refused = passes.measure(method)
    matrix, own, rule = method.matrix(gram, weights.base), shares, method.rule
    if not isinstance(rule, Sorting):
        own = method.weigh(gram, shares, matrix)

    def combine(meter: NormMeter | None) -> tuple[StreamedMean, Gap | None]:
        if isinstance(rule, Sorting):
            return passes.sort(rule, matrix, meter or NormMeter(weights.layout, len(updates))), None
        return passes.stream(own, () if meter is None else (meter,))

    if not refused:
        combined, gap = combine(None if method.measures else passes.meter)
        if not method.measures and not combined.refused and passes.bound():
            combined, gap = combine(None)
        refused = dict(combined.refused)
    else:
        combined, gap = StreamedMean(np.zeros((1, 0)), refused), None
    return Average(
        updates=passes.taken,
        means=combined.means,
        refused=refused,
        gap=gap,
        weights=own,
        accepted=describe(
            contributions := passes.contributions,
            own,
            passes.factors,
            respects_of(contributions, passes.scales),
            limits([update.header for update in updates], shares, weighting, bounds),
            number=weights.round,
        ),
    )


class _Passes:
    """Passes over some updates, of which the first gathers their norms, and the others see what counts."""

    def __init__(
        self,
        updates: Sequence[Update],
        weights: Weights,
        algorithm: ServerAlgorithm,
        bounds: Bounds,
        on_progress: Callable[[int, int], None] | None,
        effort: Effort,
    ) -> None:
        self.updates, self.weights, self.algorithm, self.bounds = updates, weights, algorithm, bounds
        self.on_progress, self.effort = on_progress, effort
        self.metrics = [update.header.metrics for update in updates]
        self.scales = factors_of([update.header for update in updates], algorithm)
        self.meter = NormMeter(weights.layout, len(updates))
        self.taken = updates
        self.factors = np.ones((2, len(updates)))

    @property
    def contributions(self) -> list[Contribution]:
        """The updates with their norms."""
        return contributions_of(self.updates, self.meter)

    def bound(self) -> bool:
        """Scale what is too large from now on; whether anything is."""
        self.factors = scaling_of(respects_of(self.contributions, self.scales), self.bounds)
        self.taken = scaled(self.updates, self.factors, self.weights.layout)
        return bool((self.factors < 1).any())

    def measure(self, method: Method) -> tuple[NDArray[np.float64], dict[int, FedparaError]]:
        """Inner products of the changes that count, and what turned out bad."""
        from fedpara_edge.aggregation.columns import read_columns
        from fedpara_edge.aggregation.rules.geometry import GramOfColumns, factor_names, gram_of_weights

        layout = self.weights.layout
        composed = method.space == "composed"
        columns = GramOfColumns(layout, len(self.updates), factor_names(layout) if composed else frozenset())
        refused = read_columns(self.updates, layout.shared, columns, meter=self.meter, effort=self.effort)
        if refused:
            return columns.result(), refused
        self.bound()
        gram = columns.result() * np.outer(self.factors[0], self.factors[0])
        return gram + gram_of_weights(self.taken, self.weights) if composed else gram, refused

    def stream(self, weights: NDArray[np.float64], meters: Sequence[Watcher]) -> tuple[StreamedMean, Gap | None]:
        """Means with these weights, and the gap."""
        gap = GapEstimator(self.weights.layout, self.weights.tensors, updates=len(self.taken))
        spread = SpreadOfMeans(self.weights.layout)
        streamed = stream_mean(
            self.taken,
            self.weights.layout.shared,
            shares=self.algorithm.shares(weights, self.metrics),
            watchers=(gap, spread, *meters),
            on_progress=self.on_progress,
            effort=self.effort,
        )
        spread.add_to(streamed.means[0], self.weights.tensors)
        return streamed, gap.result(streamed.means[0])

    def sort(self, rule: Sorting, matrix: NDArray[np.float64] | None, meter: NormMeter) -> StreamedMean:
        """Each entry combined on its own, for each of the means."""
        from fedpara_edge.aggregation.columns import read_columns

        means = np.zeros((len(self.scales), self.weights.layout.shared_parameters))

        def combine(lane: int, start: int, rows: NDArray[np.float32]) -> None:  # noqa: ARG001
            for mean, scale in zip(means, self.scales, strict=True):
                scaled = rows * scale[:, None].astype(np.float32) if len(means) > 1 else rows
                mixed = scaled if matrix is None else matrix.astype(np.float32) @ scaled
                mean[start : start + rows.shape[1]] = rule.combine(mixed)

        refused = read_columns(self.taken, self.weights.layout.shared, combine, meter=meter, effort=self.effort)
        if self.on_progress is not None:
            self.on_progress(len(self.taken), len(self.taken))
        return StreamedMean(means, refused)


def describe(
    contributions: Sequence[Contribution],
    weights: NDArray[np.float64],
    factors: NDArray[np.float64],
    respects: NDArray[np.float64],
    limited: Sequence[tuple[str, ...]],
    *,
    number: int,
) -> tuple[Accepted, ...]:
    """Facts about updates that count.

    Args:
        contributions: The updates.
        weights: Weights of the updates in the first mean, float64 [updates].
        factors: Factors by which trained tensors and running statistics were scaled down, float64 [2, updates].
        respects: Norms in every respect, float64 [respects, updates].
        limited: Names of the bounds on the weight of each that bind.
        number: Number of the round, that of the weights that are changed.
    """
    with np.errstate(invalid="ignore"):
        in_medians = np.max([row / typical(row) for row in respects], axis=0)
    means_something = np.isfinite(typical(np.array([each.norms[0] for each in contributions])))
    scales = factors.min(axis=0)
    return tuple(
        Accepted.of(
            each,
            share=float(weights[k]),
            norm_in_medians=float(in_medians[k]) if means_something else None,
            scale=float(scales[k]),
            bounded=(*(("norm",) if scales[k] < 1 else ()), *limited[k]),
            staleness=number - each.header.round,
        )
        for k, each in enumerate(contributions)
    )


def respects_of(contributions: Sequence[Contribution], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Norms in every respect, float64 [respects, updates]: of each mean, and of running statistics.

    Args:
        contributions: The updates.
        factors: Factors of the updates in each mean (`sums.factors_of`).
    """
    trained, statistics = np.array([each.norms for each in contributions]).T
    return np.vstack([trained * factors, statistics])


def contributions_of(updates: Sequence[Update], meter: NormMeter) -> list[Contribution]:
    """Updates with the norms that a meter found."""
    return [
        Contribution(
            header=update.header,
            path=update.path,
            bytes=update.file.size_bytes,
            norms=(float(norms[0]), float(norms[1])),
            sha256=update.file.known_sha256,
            update=update,
        )
        for update, norms in zip(updates, meter.norms().T, strict=True)
    ]


def scaling_of(respects: NDArray[np.float64], bounds: Bounds) -> NDArray[np.float64]:
    """Factors that bring trained tensors and running statistics down to their bound, float64 [2, updates]."""
    return np.stack([bounds.factors(respects[:-1]), bounds.factors(respects[-1:])])


def scaled(updates: Sequence[Update], factors: NDArray[np.float64], layout: Layout) -> list[Update]:
    """Updates whose trained tensors and running statistics are multiplied by factors, float64 [2, updates]."""
    runs = sorts_of(layout)
    return [
        update if (own == 1).all() else update.scaled([(start, stop, float(own[sort])) for start, stop, sort in runs])
        for update, own in zip(updates, factors.T, strict=True)
    ]


def limits(
    headers: Sequence[UpdateHeader], shares: NDArray[np.float64], weighting: Weighting, bounds: Bounds
) -> list[tuple[str, ...]]:
    """Names of the bounds on the weight of each update that bind."""
    if weighting == "equal":
        return [()] * len(headers)
    examples = [header.examples for header in headers]
    counted = bounds.count(examples)
    return [
        tuple(
            name
            for name, binds in (
                ("examples", counted[k] < examples[k]),
                ("share", shares[k] < counted[k] / sum(counted)),
            )
            if binds
        )
        for k in range(len(headers))
    ]
