"""SCAFFOLD: gradients corrected by the difference between everybody's direction and a client's own.

    client   g + c - c_i                          c_i ← c_i - c - Δ_i / R_i
    server   x ← x + η Δ                          c ← c - q (c + Σ s_i Δ_i / R_i)

R_i = Σ_k η_k is the sum of the learning rates of a client's steps. The client keeps its control variate c_i and the
server its own, c, both 0 before the first round. Down travel x and c (the server state of the round); up travel Δ_i
and, as a metric, R_i, from which the server finds c_i⁺ - c_i = -c - Δ_i / R_i. That is exact for plain SGD, which is
all that the client takes.

Clipping comes after the correction, so it clips g - c_i + c, as it should: c_i takes in what was really done and
approaches the gradient in steps of bounded length, where clipping g alone would fix the error of the clipping in every
c_i.

Source: Karimireddy et al. 2020, arXiv 1910.06378, option II. Clients are weighed equally as in the paper, which makes
c the mean of the c_i of all N clients, however few take part; weighed by examples, c is their weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms.client import ClientAlgorithm, Start, Tensors, Term, or_zero, to_float32
from fedpara_edge.algorithms.server import (
    LARGEST,
    Metrics,
    ServerAlgorithm,
    Vector,
    share_of_clients,
    wrong_algorithm,
)
from fedpara_edge.errors import InputError
from fedpara_edge.options import option

CONTROL = "control"
RATE_SUM = "learning_rate_sum"
RATE_SUMS = (1e-30, 1e30)
"""Range of a sum of learning rates that a training could have had."""
RATE_FACTOR = 10
"""Most that the mean learning rate of a device may differ from the median of the round, as a factor."""
MAJORITY = 3
"""Fewest updates whose median means something."""


@dataclass(frozen=True, kw_only=True)
class ScaffoldClient(ClientAlgorithm):
    """Gradients corrected by c - c_i."""

    name = "scaffold"
    group = CONTROL
    controlled = True
    paired = True
    states_steps = True

    def check_optimizer(self, constants: Mapping[str, Any]) -> None:
        """Plain SGD only: with anything else, -Δ / R is not the mean of the gradients."""
        found = next((key for key in ("momentum", "weight_decay") if constants.get(key)), None)
        if constants["name"] != "sgd" or found:
            stated = f"{found} {constants[found]}" if found and constants["name"] == "sgd" else constants["name"]
            raise InputError(
                f"expected plain sgd with algorithm scaffold, found {stated}; "
                "export with --optimizer sgd and no momentum, or take feddyn",
                key="optimizer",
            )

    def term(self, start: Start) -> Term:
        """c - c_i."""
        if not start.control and not start.kept:
            return Term()
        return Term(h={name: or_zero(start.control, name) - or_zero(start.kept, name) for name in start.weights})

    def keep(self, start: Start, sent: Tensors) -> dict[str, NDArray[np.float32]]:
        """c_i - c - Δ / R."""
        return {name: to_float32(name, self._next(start, name, change)) for name, change in sent.items()}

    def metrics(self, start: Start) -> dict[str, float]:
        """R."""
        return {RATE_SUM: start.rate_sum}

    def _next(self, start: Start, name: str, change: NDArray[np.float32]) -> NDArray[np.float64]:
        correction = np.subtract(or_zero(start.kept, name), or_zero(start.control, name), dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.asarray(correction - np.divide(change, start.rate_sum, dtype=np.float64))


@dataclass(frozen=True, kw_only=True)
class ScaffoldServer(ServerAlgorithm):
    """The mean, and the mean of the clients' control variates.

    Args:
        clients: Number N of all clients.
        lr: Learning rate η, above 0.

    Raises:
        InputError: An option is out of range.
    """

    clients: int = option(minimum=1, help="Number N of all clients.")
    lr: float = option(1.0, above=0, help="Learning rate η of the server.")

    name = "scaffold"
    groups = (CONTROL,)
    takes_late = False  # the clients' c_i moved by the c of the round in which they started
    weighting = "equal"

    def participation(self, updates: int) -> float:
        """|S| / N."""
        return share_of_clients(updates, self.clients)

    def check_metrics(self, metrics: Metrics) -> None:
        """R is needed, and of a size that a training could have had."""
        least, most = RATE_SUMS
        if not least <= metrics.get(RATE_SUM, 0) <= most:
            expected = f"a metric {RATE_SUM} from {least:g} to {most:g}"
            raise wrong_algorithm(self, expected, metrics.get(RATE_SUM))

    def find_deviating(self, metrics: Sequence[Metrics], steps: Sequence[int]) -> dict[int, str]:
        """R over the number of steps is a learning rate, which is much the same on all devices of a round.

        A far smaller R would make c, and with it the next gradient of every device, as much larger.
        """
        rates = np.array([metric[RATE_SUM] for metric in metrics], np.float64) / np.array(steps, np.float64)
        if len(rates) < MAJORITY:
            return {}
        usual = float(np.median(rates))
        expected = (
            f"expected a metric {RATE_SUM} of {usual / RATE_FACTOR:.3g} to {usual * RATE_FACTOR:.3g} for each step"
        )
        return {
            int(number): f"{expected}, {RATE_FACTOR} times around the median of the round, found {rates[number]:.3g}"
            for number in np.flatnonzero((rates * RATE_FACTOR < usual) | (rates > usual * RATE_FACTOR))
        }

    def largest_change(self, metrics: Metrics) -> float:
        """Δ_i / R_i must be in float32 as well."""
        return min(math.sqrt(LARGEST), LARGEST * metrics[RATE_SUM])

    def shares(self, weights: Vector, metrics: Sequence[Metrics]) -> Vector:
        """Factors for Σ s_i Δ_i and Σ s_i Δ_i / R_i."""
        return np.stack([weights, weights / np.array([metric[RATE_SUM] for metric in metrics], np.float64)])

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:
        """η Δ, and c - q (c + Σ s_i Δ_i / R_i)."""
        control = (1 - participation) * kept[CONTROL] - participation * means[1]
        return self.lr * means[0], {CONTROL: control}
