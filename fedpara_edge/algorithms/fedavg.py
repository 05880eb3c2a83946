"""FedAvg: plain local training, and the mean of the changes.

    client   g
    server   x ← x + η Δ

Nothing is kept, and nothing travels but x and Δ. With η = 1 the new weights are the mean of the clients' weights.

Source: McMahan et al. 2017, arXiv 1602.05629, which has no server learning rate η.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedpara_edge.algorithms.client import ClientAlgorithm
from fedpara_edge.algorithms.server import ServerAlgorithm, Vector
from fedpara_edge.options import option


@dataclass(frozen=True, kw_only=True)
class FedAvgClient(ClientAlgorithm):
    """Plain local training."""

    name = "fedavg"


@dataclass(frozen=True, kw_only=True)
class FedAvgServer(ServerAlgorithm):
    """The mean.

    Args:
        lr: Learning rate η, above 0.

    Raises:
        InputError: An option is out of range.
    """

    lr: float = option(1.0, above=0, help="Learning rate η of the server.")

    name = "fedavg"

    @property
    def convex(self) -> bool:
        """True as long as it goes no further than the mean."""
        return self.lr <= 1

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:  # noqa: ARG002
        """η Δ."""
        return self.lr * means[0], {}
