"""Krum: the change whose nearest neighbours are nearest.

    score_i = Σ_{j ∈ N_i} ‖x_i - x_j‖²,    N_i the n - f - 1 nearest others of i

`krum` takes the change of the least score, `multi-krum` the mean of the n - f of least scores. Of equal scores the
first by the client's name counts.

Sources: Blanchard et al. 2017, arXiv 1703.02757, which has one neighbour fewer; with n - f counting i itself as in
Allouah et al. 2023, arXiv 2302.01772.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpara_edge.aggregation.rules.rule import Vector, Weighing, count_bad, squared_distances
from fedpara_edge.options import option


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Weighing):
    """The mean of the changes with the least scores.

    Args:
        share: Share of the updates that may be bad.
    """

    share: float = option(0.2, minimum=0, below=0.5, help="Share of the updates that may be bad.")

    name = "multi-krum"

    def taken(self, changes: int) -> int:
        """Number of changes in the mean."""
        return changes - count_bad(self.share, changes)

    def weigh(self, gram: Vector, shares: Vector) -> Vector:  # noqa: ARG002
        """Equal weights of those taken."""
        changes = len(gram)
        neighbours = changes - count_bad(self.share, changes)
        # The first is the change itself, at distance 0.
        scores = np.sort(squared_distances(gram), axis=1)[:, 1:neighbours].sum(axis=1)
        taken = np.argsort(scores, kind="stable")[: self.taken(changes)]
        weights = np.zeros(changes)
        weights[taken] = 1 / len(taken)
        return weights


@dataclass(frozen=True, kw_only=True)
class Krum(MultiKrum):
    """The change with the least score.

    Args:
        share: Share of the updates that may be bad.
    """

    name = "krum"

    def taken(self, changes: int) -> int:  # noqa: ARG002
        """One."""
        return 1
