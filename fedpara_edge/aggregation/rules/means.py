"""Means with weights of their own: none of the changes above a bound, or pulled towards each other.

| rule                | the change                                                                    |
|---------------------|-------------------------------------------------------------------------------|
| `norm-bounded`      | Σ s_i x_i min(1, τ / ‖x_i‖), τ = `norm` medians of the norms                  |
| `centered-clipping` | v ← v + 1/n Σ (x_i - v) min(1, τ / ‖x_i - v‖) from v = 0, `iterations` times   |
| `geometric-median`  | argmin_v Σ ‖x_i - v‖, by smoothed Weiszfeld steps from the mean               |

Sources: Sun et al. 2019, arXiv 1911.07963 (norm bounding); Karimireddy et al. 2021, arXiv 2012.10333 (centered
clipping, there from the result of the round before, whose place the base takes here); Pillutla et al. 2022,
arXiv 1912.13445 (RFA, algorithm 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpara_edge.aggregation.rules.rule import Vector, Weighing
from fedpara_edge.options import option

SMOOTHING = 1e-6
"""Least distance in a Weiszfeld step, in medians of the norms."""


@dataclass(frozen=True, kw_only=True)
class NormBounded(Weighing):
    """The mean of changes none of which is longer than a bound.

    Args:
        norm: Largest norm, in medians of the norms.
    """

    norm: float = option(1.0, above=0, help="Largest norm, in medians of the norms.")

    name = "norm-bounded"
    weighted = True

    def weigh(self, gram: Vector, shares: Vector) -> Vector:
        """Shares times min(1, τ / ‖x_i‖)."""
        norms = np.sqrt(np.diag(gram))
        return shares * _clipped(norms, self.norm * float(np.median(norms)))


@dataclass(frozen=True, kw_only=True)
class CenteredClipping(Weighing):
    """The mean of changes that are clipped around the last iterate.

    Args:
        radius: Radius τ, in medians of the norms.
        iterations: Number of steps.
    """

    radius: float = option(1.0, above=0, help="Radius of the clipping, in medians of the norms.")
    iterations: int = option(5, minimum=1, maximum=1000, help="Steps.")

    name = "centered-clipping"

    def weigh(self, gram: Vector, shares: Vector) -> Vector:  # noqa: ARG002
        """Weights of the last iterate, which starts at no change."""
        radius = self.radius * float(np.median(np.sqrt(np.diag(gram))))
        weights = np.zeros(len(gram))
        for _ in range(self.iterations):
            clipped = _clipped(_distances_from(weights, gram), radius) / len(gram)
            weights = (1 - clipped.sum()) * weights + clipped
        return weights


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Weighing):
    """The point with the least sum of distances.

    Args:
        iterations: Largest number of Weiszfeld steps; they end when the weights don't change any more.
    """

    iterations: int = option(100, minimum=1, maximum=100_000, help="Weiszfeld steps at most.")

    name = "geometric-median"

    def weigh(self, gram: Vector, shares: Vector) -> Vector:  # noqa: ARG002
        """Weights in proportion to one over the distance from the last iterate."""
        least = SMOOTHING * float(np.median(np.sqrt(np.diag(gram))))
        weights = np.full(len(gram), 1 / len(gram))
        for _ in range(self.iterations):
            distances = np.maximum(_distances_from(weights, gram), least)
            if not distances.all():
                break
            inverse = distances.min() / distances
            following = inverse / inverse.sum()
            if np.abs(following - weights).max() < 1e-12:
                return np.asarray(following)
            weights = following
        return weights


def _clipped(norms: Vector, most: float) -> Vector:
    """min(1, τ / ‖x_i‖)."""
    return np.asarray(np.where(norms > most, most / np.maximum(norms, np.finfo(np.float64).tiny), 1.0))


def _distances_from(weights: Vector, gram: Vector) -> Vector:
    """Distances of the changes from their combination with some weights."""
    products = gram @ weights
    return np.asarray(np.sqrt(np.maximum(np.diag(gram) - 2 * products + weights @ products, 0)))
