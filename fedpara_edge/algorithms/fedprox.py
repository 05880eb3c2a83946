"""FedProx: a pull towards the global weights, against drift in long local training on unlike data.

    client   g + μ (w - x)

that is, the loss plus μ/2 ‖w - x‖². Nothing is kept, and nothing travels but x and Δ. The server does nothing of its
own, so the clients go with `fedavg` or any server algorithm but those that need clients of their own kind.

Source: Li et al. 2020, arXiv 1812.06127. The paper lets slow clients do fewer steps; here every client does all of its
epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpara_edge.algorithms.client import ClientAlgorithm, Start, Term
from fedpara_edge.options import option


@dataclass(frozen=True, kw_only=True)
class FedProx(ClientAlgorithm):
    """A pull towards the global weights.

    Args:
        mu: Strength μ, at least 0.

    Raises:
        InputError: An option is out of range.
    """

    mu: float = option(0.1, minimum=0, help="Strength μ of the proximal term.")

    name = "fedprox"

    def term(self, start: Start) -> Term:
        """μ (w - x)."""
        return Term(mu=self.mu, h={name: -np.float32(self.mu) * tensor for name, tensor in start.weights.items()})
