"""Mixing in front of a rule: changes of clients with different data are made more alike before the odd ones are sought.

| mixing      | x_i becomes                                                                                   |
|-------------|-----------------------------------------------------------------------------------------------|
| `nnm`       | the mean of the n - f changes nearest to x_i, itself among them                               |
| `bucketing` | the mean of a bucket of `size` changes, drawn at random; there are fewer buckets than changes |

Both are linear: a matrix M [mixed, changes] whose rows sum to 1. The draw depends on `seed` and on the base weights, so
that it is another one in each round and the same for all who aggregate it.

Sources: Allouah et al. 2023, arXiv 2302.01772 (nearest-neighbour mixing); Karimireddy et al. 2022, arXiv 2006.09365
(bucketing).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from fedpara_edge.aggregation.rules.rule import Rule, Vector, count_bad, squared_distances
from fedpara_edge.options import option


@dataclass(frozen=True, kw_only=True)
class Mixing(Rule):
    """A way to mix."""

    def matrix(self, gram: Vector, base: str) -> Vector:
        """M, float64 [mixed, changes].

        Args:
            gram: Inner products of the changes, float64 [changes, changes]; any where `measures` is false.
            base: Digest of the weights that they change.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NearestNeighbours(Mixing):
    """Means of nearest neighbours.

    Args:
        share: Share of the updates that may be bad.
    """

    share: float = option(0.2, minimum=0, below=0.5, help="Share of the updates that may be bad.")

    name = "nnm"
    measures = True

    def matrix(self, gram: Vector, base: str) -> Vector:  # noqa: ARG002
        """Equal weights of the nearest."""
        changes = len(gram)
        nearest = changes - count_bad(self.share, changes)
        taken = np.argsort(squared_distances(gram), axis=1, kind="stable")[:, :nearest]
        matrix = np.zeros((changes, changes))
        np.put_along_axis(matrix, taken, 1 / nearest, axis=1)
        return matrix


@dataclass(frozen=True, kw_only=True)
class Bucketing(Mixing):
    """Means of random buckets.

    Args:
        size: Number of changes in a bucket; the last one may have fewer.
        seed: Seed of the draw.
    """

    size: int = option(2, minimum=1, help="Changes in a bucket.")
    seed: int = option(0, minimum=0, help="Seed of the draw.")

    name = "bucketing"

    def matrix(self, gram: Vector, base: str) -> Vector:
        """Equal weights of those in a bucket."""
        changes = len(gram)
        digest = hashlib.sha256(f"{self.seed} {base}".encode()).digest()
        order = np.random.default_rng(int.from_bytes(digest, "big")).permutation(changes)
        matrix = np.zeros((-(-changes // self.size), changes))
        for number in range(len(matrix)):
            bucket = order[number * self.size : (number + 1) * self.size]
            matrix[number, bucket] = 1 / len(bucket)
        return matrix
