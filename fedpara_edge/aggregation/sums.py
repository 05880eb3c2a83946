"""Exact sums of the changes of a model (`exact`).

There is a sum for each mean that the algorithm asks for, and one for the squared changes of running means (`spread`).
The weight of an update in the first is its number of examples, or 1; in further ones it is that times the algorithm's
factor for the update, such as 1 / R_i for scaffold, rounded to a multiple of 2^-64. So a weight does not depend on the
other updates, and sums of parts of a round add up to those of the round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.contribution import factors_of
from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.aggregation.exact import ExactSum
from fedpara_edge.aggregation.norms import NormMeter
from fedpara_edge.aggregation.spread import running_means
from fedpara_edge.aggregation.stream import EntryWatcher, Watcher, watch
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.codecs.changes import Changes
from fedpara_edge.codecs.codec import chunks
from fedpara_edge.errors import FedparaError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.partial import Digits
from fedpara_edge.formats.update import Update, UpdateHeader
from fedpara_edge.privacy.mechanism import Gaussian, clipped

FRACTION_BITS = 64
"""Bits behind the point of a weight that is no number of examples."""

Weights = Sequence[Sequence[int]]
"""Weights of the updates in the sum of each mean, [means][updates]."""


class PieceSums:
    """A vector of exact sums in pieces that threads can work on, of which each has the levels that it needs.

    Args:
        ranges: First entry and entry after the last one of each piece, in order.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.ranges = list(ranges)
        self.pieces = [ExactSum(stop - start) for start, stop in self.ranges]

    @property
    def entries(self) -> int:
        """Number of sums."""
        return self.ranges[-1][1] if self.ranges else 0

    def add_digits(self, level: int, digits: NDArray[np.int32]) -> None:
        """Add the digits of a level of other sums, int32 [entries]."""
        for (start, stop), piece in zip(self.ranges, self.pieces, strict=True):
            if (part := digits[start:stop]).any():
                piece.add_digits(level, part)

    def digits(self) -> Digits:
        """The digits of all levels."""
        found = [piece.digits() for piece in self.pieces]
        levels = [level for digits in found for level in digits]
        lowest, highest = min(levels, default=0), max(levels, default=-1)
        rows = np.zeros((highest + 1 - lowest, self.entries), np.int32)
        for (start, stop), digits in zip(self.ranges, found, strict=True):
            for level, values in digits.items():
                rows[level - lowest, start:stop] = values
        return Digits(lowest=lowest, rows=rows)


class ModelSums:
    """Exact sums of the changes of a model, or of what is left of them once they were clipped (`privacy.mechanism`).

    Args:
        layout: Layout of the model.
        algorithm: Server algorithm, which says what means it needs.
        mechanism: Mechanism for which changes are clipped, to integers on its grid; None to add them as they are.
    """

    def __init__(self, layout: Layout, algorithm: ServerAlgorithm, mechanism: Gaussian | None = None) -> None:
        self.layout, self._mechanism = layout, mechanism
        ranges = list(chunks(layout.shared_parameters))
        self.means = [PieceSums(ranges) for _ in factors_of([], algorithm)]
        self.squares = PieceSums([(0, len(running_means(layout)))])

    def parts(self) -> dict[str, PieceSums]:
        """All sums, by the names that they have in a partial."""
        return {**{f"mean/{number}": mean for number, mean in enumerate(self.means)}, "squares": self.squares}

    def meter(self, updates: int) -> NormMeter:
        """A meter of the norms of some updates, as exact as clipping needs it."""
        return NormMeter(self.layout, updates, exact=self._mechanism is not None)

    def add(
        self,
        updates: Sequence[Update],
        weights: Weights,
        *,
        meter: NormMeter,
        on_progress: Callable[[int, int], None] | None = None,
        effort: Effort = USUAL,
    ) -> Mapping[int, FedparaError]:
        """Add updates; the errors of those that turned out bad, by number, after which the sums mean nothing.

        Args:
            updates: Closed updates.
            weights: Weights of each in the sum of each mean.
            meter: New `meter` of their norms.
            on_progress: Function that is called with the number of files read and of all.
            effort: Division of the work.
        """
        if not updates:
            return {}
        if self._mechanism is None:
            watchers: tuple[Watcher, ...] = meter, _Adding(self, weights)
        else:
            if refused := watch(updates, self.layout.shared, watchers=(meter,), effort=effort):
                return refused
            watchers = (_Adding(self, weights, self._mechanism.factors(meter.norms()[0])),)
        return watch(updates, self.layout.shared, watchers=watchers, on_progress=on_progress, effort=effort)

    def add_good(self, updates: Sequence[Update], weights: Weights, *, effort: Effort) -> None:
        """Add updates whose values were read before.

        Raises:
            FedparaError: The file of one is gone or was changed.
        """
        for error in self.add(updates, weights, meter=self.meter(len(updates)), effort=effort).values():
            raise error


class _Adding(EntryWatcher):
    """Watcher that adds the values to exact sums as they pass, clipped where there are factors for it."""

    def __init__(self, sums: ModelSums, weights: Weights, factors: NDArray[np.float64] | None = None) -> None:
        super().__init__(running_means(sums.layout))
        self._sums, self._weights, self._factors = sums, weights, factors
        self._numbers = {start: number for number, (start, _) in enumerate(sums.means[0].ranges)}
        self._first = self._stop = 0

    def start_block(self, files: int) -> None:
        super().start_block(files)
        self._first, self._stop = self._stop, self._stop + files

    def collect(self, start: int, changes: Changes) -> None:
        super().collect(start, changes)
        values: NDArray[np.floating[Any]] = changes.values()
        if self._factors is not None:
            values = clipped(values, self._factors[self._first : self._stop])
        for mean, weights in zip(self._sums.means, self._weights, strict=True):
            mean.pieces[self._numbers[start]].add(values, weights[self._first : self._stop])

    def finish_block(self, shares: NDArray[np.float64], thread: int, threads: int) -> None:  # noqa: ARG002
        if thread == 0:
            changes = self._changes[: len(shares)].astype(np.float64)
            self._sums.squares.pieces[0].add(np.square(changes), self._weights[0][self._first : self._stop])


def own_weights(contributions: Sequence[UpdateHeader], algorithm: ServerAlgorithm, weighting: Weighting) -> Weights:
    """Weights of updates in the sums, none of which depends on the others."""
    counts = [1 if weighting == "equal" else header.examples for header in contributions]
    return weights_of(counts, factors_of(contributions, algorithm))


def weights_of(counts: Sequence[int], factors: NDArray[np.float64]) -> Weights:
    """Weights in the sum of each mean, from those in the first; further ones have `FRACTION_BITS` behind the point."""
    further = [[count * fixed(factor) for count, factor in zip(counts, row, strict=True)] for row in factors[1:]]
    return [list(counts), *further]


def fixed(number: float) -> int:
    """A number as a multiple of 2^-64, rounded."""
    numerator, denominator = float(number).as_integer_ratio()
    return ((numerator << FRACTION_BITS + 1) // denominator + 1) >> 1
