"""Measure by round, averaged over the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """Measure by round, averaged over the seeds.

    Attributes:
        rounds: Rounds with a value for every seed, ascending, [N].
        mean: Mean over the seeds, [N].
        sd: Standard deviation over the seeds (n - 1), [N]; zeros for one seed.
        seeds: Number of seeds.
    """

    rounds: Numbers
    mean: Numbers
    sd: Numbers
    seeds: int

    @property
    def smooth(self) -> Numbers:
        """Mean of each point and its two neighbours, [N]; the first and the last point as they are."""
        smooth = self.mean.copy()
        smooth[1:-1] = (self.mean[:-2] + self.mean[1:-1] + self.mean[2:]) / 3
        return smooth

    @property
    def best(self) -> float:
        """Highest point of the smooth curve."""
        return float(self.smooth.max())

    def reaches(self, target: float) -> float | None:
        """Round, interpolated, at which the smooth curve first reaches a target; None if it never does.

        >>> rounds, accuracy = np.array([2.0, 4.0]), np.array([0.4, 0.4])
        >>> Curve(rounds, accuracy, accuracy * 0, 1).reaches(0.4), Curve(rounds, accuracy, accuracy * 0, 1).reaches(0.5)
        (2.0, None)
        """
        smooth = self.smooth
        above = np.flatnonzero(smooth >= target)
        if not len(above):
            return None
        last = above[0]
        if last == 0:
            return float(self.rounds[0])
        return float(np.interp(target, smooth[last - 1 : last + 1], self.rounds[last - 1 : last + 1]))


def curve_of(series: Iterable[Mapping[int, float]]) -> Curve | None:
    """Curve of the seeds that have the measure, given as value by round; None if none has."""
    present = [values for values in series if values]
    rounds = sorted(set.intersection(*(set(values) for values in present))) if present else []
    if not rounds:
        return None
    values = np.array([[of[number] for number in rounds] for of in present])
    sd = values.std(axis=0, ddof=1) if len(present) > 1 else np.zeros(len(rounds))
    return Curve(np.array(rounds, np.float64), values.mean(axis=0), sd, len(present))
