"""FedAvgM: the mean of the changes with momentum, on the server alone.

    server   m ← β m + Δ                          x ← x + η m

The server keeps m, 0 before the first round. Nothing travels but x and Δ; clients train plainly or with `fedprox`.
For the factors of an update (`fedpara_edge.factors.update`), m is 0 again with each period, as they are.

Source: Hsu et al. 2019, arXiv 1909.06335.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedpara_edge.algorithms.server import ServerAlgorithm, Vector
from fedpara_edge.options import option


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerAlgorithm):
    """The mean with momentum.

    Args:
        lr: Learning rate η, above 0.
        momentum: Factor β, from 0 to below 1.

    Raises:
        InputError: An option is out of range.
    """

    lr: float = option(1.0, above=0, help="Learning rate η of the server.")
    momentum: float = option(0.9, minimum=0, below=1, help="Momentum β.")

    name = "fedavgm"
    groups = ("momentum",)
    restarts = True

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:  # noqa: ARG002
        """η m with the new m = β m + Δ."""
        momentum = self.momentum * kept["momentum"] + means[0]
        return self.lr * momentum, {"momentum": momentum}
