"""The server's half of an algorithm: from the mean change to the next weights, and what is kept from round to round.

With Δ = Σ_{i∈S} s_i Δ_i the mean change of the clients S of a round, N the number of all clients and q = |S| / N, an
algorithm turns Δ, and whatever other means it asks for (`shares`), into a movement of the weights x. What it keeps are
*groups*: vectors of the size of the weights.

The shares s_i go by examples, n_i / Σ n, or are equal, 1 / |S|. Where client and server keep something together, the
same shares weigh both, so that what all clients keep cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms.algorithm import Algorithm
from fedpara_edge.errors import InputError, InvalidUpdateError

Weighting = Literal["examples", "equal"]
Vector = NDArray[np.float64]
Metrics = Mapping[str, float]

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class ServerAlgorithm(Algorithm):
    """What a server algorithm has to say.

    Attributes:
        groups: Names of the vectors that it keeps.
        takes_refit: Whether the mean that it gets may be that of refitted factors.
        takes_late: Whether clients of earlier rounds may be in the mean.
        weighting: Weighting of the clients unless the user asks for another.
        restarts: Whether what it keeps may start anew for some entries, as it does for factors of updates with each
            of their periods.
    """

    groups: ClassVar[tuple[str, ...]] = ()
    takes_refit: ClassVar[bool] = True
    takes_late: ClassVar[bool] = True
    weighting: ClassVar[Weighting] = "examples"
    restarts: ClassVar[bool] = False

    @property
    def convex(self) -> bool:
        """Whether the new weights lie between those of the base and of the clients."""
        return False

    def participation(self, updates: int) -> float:  # noqa: ARG002
        """The share q of all clients that take part, in (0, 1]; 1 where the algorithm does not ask.

        Raises:
            InputError: More clients take part than there are.
        """
        return 1.0

    def check_metrics(self, metrics: Metrics) -> None:
        """Refuse an update that was not trained for this algorithm, as far as its metrics tell.

        Raises:
            InvalidUpdateError: A metric is missing or differs.
        """

    def find_deviating(self, metrics: Sequence[Metrics], steps: Sequence[int]) -> dict[int, str]:  # noqa: ARG002
        """What is wrong with the metrics of some updates beside those of the others, by their number.

        Args:
            metrics: Metrics of the updates, each of which `check_metrics` took.
            steps: Numbers of steps that they state.
        """
        return {}

    def largest_change(self, metrics: Metrics) -> float:  # noqa: ARG002
        """Largest entry of a client's change whose square, and what is kept, stays in float32."""
        return math.inf if self.convex else math.sqrt(LARGEST)

    def shares(self, weights: Vector, metrics: Sequence[Metrics]) -> Vector:  # noqa: ARG002
        """Factors of the clients' changes in each mean that `step` needs, float64 [means, updates].

        Args:
            weights: Shares s_i, float64 [updates], which sum to 1.
            metrics: Metrics of the updates.
        """
        return weights[None]

    def start(self, group: str) -> float:  # noqa: ARG002
        """Value of all entries of a group before the first round."""
        return 0.0

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:
        """The movement of the weights, float64 [entries], and the groups after it.

        It acts on each entry alone, so any part of a model gives that part of the result.

        Args:
            means: Means for `shares`, float64 [means, entries].
            kept: Groups before the step, float64 [entries] each.
            participation: Share q of all clients that take part.
        """
        raise NotImplementedError


def share_of_clients(updates: int, clients: int) -> float:
    """q = |S| / N.

    Raises:
        InputError: More clients take part than there are.
    """
    if updates > clients:
        raise InputError(
            f"expected at least as many as the {updates} that take part, found {clients}; "
            "give the number of all clients of the federation",
            key="clients",
        )
    return updates / clients


def wrong_algorithm(algorithm: ServerAlgorithm, expected: str, found: float | None) -> InvalidUpdateError:
    """The error of an update that was trained for another algorithm or with other options.

    Args:
        algorithm: Server algorithm.
        expected: Metric that its updates state.
        found: Value of that metric; None if there is none.
    """
    return InvalidUpdateError(
        f"expected {expected} for algorithm {algorithm.name}, found {'none' if found is None else f'{found:g}'}; "
        "train with the server's algorithm and options",
        code="wrong_algorithm",
    )
