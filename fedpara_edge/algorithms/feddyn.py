"""FedDyn: a penalty that moves with the rounds, so that all local optima come to agree with the global one.

    client   g + α (w - x) - ∇_i                  ∇_i ← ∇_i - α Δ_i
    server   x ← x + Δ - h / α                    h ← h - α q Δ

The client keeps ∇_i and the server h, both 0 before the first round. Nothing travels but x and Δ_i, and α as a metric,
which must be the same on both sides. With equal shares h is the mean of the ∇_i of all N clients, however few take
part.

Source: Acar et al. 2021, arXiv 2111.04263. It weighs clients equally, and so does this one unless told otherwise; its
server has no learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms.client import ClientAlgorithm, Start, Tensors, Term, or_zero, to_float32
from fedpara_edge.algorithms.server import (
    Metrics,
    ServerAlgorithm,
    Vector,
    share_of_clients,
    wrong_algorithm,
)
from fedpara_edge.options import option

ALPHA = "alpha"


@dataclass(frozen=True, kw_only=True)
class FedDynClient(ClientAlgorithm):
    """The moving penalty.

    Args:
        alpha: Strength α, above 0 and the same as the server's.

    Raises:
        InputError: An option is out of range.
    """

    alpha: float = option(0.1, above=0, help="Strength α, the same on both halves.")

    name = "feddyn"
    group = "dynamic"
    paired = True

    def term(self, start: Start) -> Term:
        """α (w - x) - ∇_i."""
        alpha = np.float32(self.alpha)
        h = {name: -alpha * tensor - or_zero(start.kept, name) for name, tensor in start.weights.items()}
        return Term(mu=self.alpha, h=h)

    def keep(self, start: Start, sent: Tensors) -> dict[str, NDArray[np.float32]]:
        """∇_i - α Δ."""
        return {
            name: to_float32(name, or_zero(start.kept, name) - np.multiply(change, self.alpha, dtype=np.float64))
            for name, change in sent.items()
        }

    def metrics(self, start: Start) -> dict[str, float]:  # noqa: ARG002
        """α."""
        return {ALPHA: self.alpha}


@dataclass(frozen=True, kw_only=True)
class FedDynServer(ServerAlgorithm):
    """The mean of the trained weights, less what the clients' penalties have gathered.

    Args:
        clients: Number N of all clients.
        alpha: Strength α, above 0 and the same as the clients'.

    Raises:
        InputError: An option is out of range.
    """

    clients: int = option(minimum=1, help="Number N of all clients.")
    alpha: float = option(0.1, above=0, help="Strength α, the same on both halves.")

    name = "feddyn"
    groups = ("h",)
    takes_refit = False  # h is the mean of what the clients keep, who know nothing of a refit
    takes_late = False  # nor of the server's h by which they started
    weighting = "equal"

    def participation(self, updates: int) -> float:
        """|S| / N."""
        return share_of_clients(updates, self.clients)

    def check_metrics(self, metrics: Metrics) -> None:
        """Clients and server must have one α."""
        if metrics.get(ALPHA) != self.alpha:
            raise wrong_algorithm(self, f"metric {ALPHA} {self.alpha:g}", metrics.get(ALPHA))

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:
        """Δ - h / α with the new h = h - α q Δ."""
        h = kept["h"] - self.alpha * participation * means[0]
        return means[0] - h / self.alpha, {"h": h}
