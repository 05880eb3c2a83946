"""Candidates in exact sums: updates, and partials that have some of them already (`candidates.Candidates`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedpara_edge.aggregation.averaging import Average
from fedpara_edge.aggregation.candidates import Combining, left
from fedpara_edge.aggregation.finishing import finish, remove
from fedpara_edge.aggregation.gathering import Gathered, gather
from fedpara_edge.errors import FedparaError


class Summed:
    """Updates in exact sums, of their own or of partials (`gathering`).

    Args:
        paths: Update files and partials, in any order.
        combining: Options by which they are combined.
    """

    def __init__(self, paths: Sequence[Path], combining: Combining) -> None:
        self._paths, self._combining = paths, combining
        gathered = self._gather()
        self._gathered: Gathered | None = gathered
        self.updates, self.rejected = list(gathered.contributions), list(gathered.rejected)

    def average(self) -> Average:
        """Their mean; with the updates themselves if all are there."""
        how, gathered = self._combining, self._gathered or self._gather()
        counting = {each.header.sender for each in self.updates}
        out = [each for each in gathered.contributions if each.header.sender not in counting]
        remove(out, gathered.sums, how.algorithm, how.weighting, reason="they can't be right", effort=how.effort)
        self._gathered = None  # the sums are used up below
        if how.privacy is not None:
            from fedpara_edge.aggregation.private import finish_privately

            return self._whole(finish_privately(self.updates, gathered.sums, how.weights, how.privacy))
        mean = finish(
            self.updates,
            gathered.sums,
            how.weights,
            how.algorithm,
            weighting=how.weighting,
            bounds=how.bounds,
            effort=how.effort,
        )
        return self._whole(mean)

    def refuse(self, errors: Mapping[int, FedparaError]) -> None:
        """Leave updates out, by number; those of partials are taken away again."""
        self.updates = left(self.updates, errors, self.rejected)

    def _whole(self, mean: Average) -> Average:
        """A mean with all of the updates themselves, or none."""
        return mean if len(mean.updates) == len(self.updates) else replace(mean, updates=())

    def _gather(self) -> Gathered:
        how = self._combining
        return gather(
            self._paths,
            how.weights,
            how.algorithm,
            weighting=how.weighting,
            mechanism=None if how.privacy is None else how.privacy.mechanism,
            gate=how.gate,
            history=how.history,
            on_progress=how.on_progress,
            effort=how.effort,
        )
