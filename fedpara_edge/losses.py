"""Losses that a training can minimize, as they are typed: a name, and options after a colon.

This is what devices and servers know of a loss: which labels it takes and how it is spelled. What it computes stands in
the graphs of a bundle (`export.step.losses`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedpara_edge.metrics import Kind
from fedpara_edge.options import choose, typed


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss with its options.

    Attributes:
        name: Name of the loss.
        labels: Kind of its labels.
    """

    name: ClassVar[str]
    labels: ClassVar[Kind]

    def __str__(self) -> str:
        return typed(self.name, self)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Mean over all labels of -log softmax(outputs)[label], for outputs [B, C, ...] and labels int64 [B, ...]."""

    name = "cross_entropy"
    labels = "classes"


@dataclass(frozen=True, kw_only=True)
class MeanSquaredError(Loss):
    """Mean of (outputs - labels)², for outputs and float32 labels of the same shape."""

    name = "mse"
    labels = "numbers"


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(Loss):
    """Mean of -y log σ(z) - (1 - y) log(1 - σ(z)), for outputs z and float32 labels y in [0, 1] of the same shape."""

    name = "bce"
    labels = "probabilities"


LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (CrossEntropy, MeanSquaredError, BinaryCrossEntropy)}
"""Losses by name."""


def find_loss(text: str) -> Loss:
    """Loss that a text stands for.

    Raises:
        InputError: There is none of that name, or an option does not fit.

    >>> str(find_loss("mse"))
    'mse'
    """
    loss: Loss = choose(LOSSES, text, key="loss")
    return loss
