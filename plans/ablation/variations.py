"""What is varied: what the runs of a batch have in common, and what may differ between them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Structure:
    """What the runs of a batch have in common.

    Args:
        kind: Kind of the factored layers (`kinds.Layer`).
        ranks: Ranks of conv2, conv3 and conv4; 0 for a dense layer.
        optimizer: `adamw` or `sgd`.
        preconditioned: Whether gradients of factors are divided by the diagonal of Jᵀ J.
        cyclic: Whether one factor of each layer is trained in a round, in turns.
        width: Factor of the network's channels.
        warm_up: Number of rounds in which the weights are dense, before factors of them are fitted (not of updates).
    """

    kind: str
    ranks: tuple[int, ...] = (0, 0, 0)
    optimizer: str = "adamw"
    preconditioned: bool = False
    cyclic: bool = False
    width: int = 1
    warm_up: int = 0

    @property
    def warm(self) -> Structure:
        """Structure of the rounds of the warm-up."""
        return replace(self, kind="dense", ranks=(0,) * len(self.ranks))


@dataclass(frozen=True)
class Setting:
    """What may differ between the runs of a batch.

    Args:
        lr: Learning rate of the clients in the first round.
        decay: Factor of the rate from round to round.
        weight_decay: Weight decay of AdamW.
        momentum: Momentum of SGD.
        frobenius: Factor λ of the composed weight in its gradient.
        scale: Scale c of an update relative to the even one.
        how: Distribution of the directions (`kinds.directions`).
        masked: Whether there are signs.
        reset_every: Rounds of a period.
        known: Share of the directions that are those of the last rounds' movement.
        beta: Momentum of the server.
        base_beta: Momentum of the server on the base of an update.
        eta: Rate of the server.
        fedexp: Whether the rate of the server is FedExP's.
    """

    lr: float
    decay: float = 0.97
    weight_decay: float = 0.01
    momentum: float = 0.0
    frobenius: float = 0.0
    scale: float = 1.0
    how: str = "uniform"
    masked: bool = True
    reset_every: int = 1
    known: float = 0.0
    beta: float = 0.0
    base_beta: float = 0.0
    eta: float = 1.0
    fedexp: bool = False
