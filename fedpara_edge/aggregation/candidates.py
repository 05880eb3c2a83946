"""The updates of a round that may count, and how they are combined: read as they are, or in exact sums.

Both leave out what turned out bad, and are asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from fedpara_edge.aggregation.averaging import Average, average
from fedpara_edge.aggregation.bounds import Bounds
from fedpara_edge.aggregation.contribution import Contribution
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.gate import Gate
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.aggregation.screening import Rejected, screen
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.errors import FedparaError
from fedpara_edge.formats.history import History
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights
from fedpara_edge.privacy.budget import Privacy


@dataclass(frozen=True, kw_only=True)
class Combining:
    """Options by which the updates of a round are combined; `aggregation.aggregate` describes them."""

    weights: Weights
    algorithm: ServerAlgorithm
    weighting: Weighting
    bounds: Bounds
    method: Method
    gate: Gate | None
    privacy: Privacy | None
    history: History
    on_progress: Callable[[int, int], None] | None
    effort: Effort


Taken = TypeVar("Taken", Update, Contribution)


class Candidates(Protocol):
    """Updates that may count.

    Attributes:
        rejected: Files that were refused.
    """

    rejected: list[Rejected]

    @property
    def updates(self) -> Sequence[Update] | Sequence[Contribution]:
        """The updates, sorted by client."""
        ...

    def average(self) -> Average:
        """Their combination."""
        ...

    def refuse(self, errors: Mapping[int, FedparaError]) -> None:
        """Leave updates out, by number."""
        ...


class Screened:
    """Updates that are read as they are.

    Args:
        paths: Update files, in any order.
        combining: Options by which they are combined.
    """

    def __init__(self, paths: Sequence[Path], combining: Combining) -> None:
        self._combining = combining
        self.updates, self.rejected = screen(
            paths, combining.weights, combining.algorithm, combining.gate, history=combining.history
        )

    def average(self) -> Average:
        """Their combination by the rule, or their noisy mean."""
        how = self._combining
        if how.privacy is not None:
            from fedpara_edge.aggregation.private import average_privately

            return average_privately(
                self.updates, how.weights, how.privacy, on_progress=how.on_progress, effort=how.effort
            )
        return average(
            self.updates,
            how.weights,
            how.algorithm,
            weighting=how.weighting,
            bounds=how.bounds,
            method=how.method,
            on_progress=how.on_progress,
            effort=how.effort,
        )

    def refuse(self, errors: Mapping[int, FedparaError]) -> None:
        """Leave updates out, by number."""
        self.updates = left(self.updates, errors, self.rejected)


def left(updates: Sequence[Taken], errors: Mapping[int, FedparaError], rejected: list[Rejected]) -> list[Taken]:
    """What is left of some updates without those that have an error, by number, which join the rejected ones."""
    for number, error in errors.items():
        rejected.append(Rejected(updates[number].path, updates[number].header.client, error))
    return [update for number, update in enumerate(updates) if number not in errors]
