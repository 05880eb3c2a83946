"""Losses that a training can minimize, as they are typed: a name, and options after a colon.

    cross_entropy:label_smoothing=0.1,ignore_index=-100,class_weights=1,2,5
    huber:delta=2
    losses.py:focal:kind=classes        a function of the user's own, the same as own:function=losses.py:focal,…

This is what devices and servers know of a loss: which labels it takes, which of them count, and how it is spelled. What
it computes stands in the graphs of a bundle (`export.step.losses`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.metrics import Kind
from fedpara_edge.options import check, choose, option, typed


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss with its options.

    Args:
        weight: Factor of the loss in the sum over the outputs of a model.

    Attributes:
        name: Name of the loss.
    """

    name: ClassVar[str]
    _labels: ClassVar[Kind]
    weight: float = option(1.0, above=0)

    def __post_init__(self) -> None:
        check(self)

    def __str__(self) -> str:
        return typed(self.name, self)

    @property
    def labels(self) -> Kind:
        """Kind of the labels."""
        return self._labels

    @property
    def ignored(self) -> int | None:
        """Label that does not count; None if all count."""
        return None

    @property
    def divisible(self) -> bool:
        """Whether the loss of a batch is the mean of those of its parts, weighted by what is `counted` of them."""
        return True

    def counted(self, labels: NDArray[Any]) -> float:
        """Weight of a batch with these labels [B, ...] in the mean over several: that by which the loss divides."""
        return float(len(labels))


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Mean over all labels of -log softmax(outputs)[label], for outputs [B, C, ...] and labels int64 [B, ...].

    The options are those of `torch.nn.functional.cross_entropy`, and so is the mean: labels that are ignored don't
    count, and others count as much as their class weighs. A batch of ignored labels alone has loss 0.

    Args:
        label_smoothing: Share of every label that is spread evenly over all classes.
        ignore_index: Label that does not count, such as that of padded positions.
        class_weights: Weight of each class; none for equal ones.
    """

    name = "cross_entropy"
    _labels = "classes"
    label_smoothing: float = option(0.0, minimum=0, maximum=1)
    ignore_index: int | None = option(None)
    class_weights: tuple[float, ...] = option((), minimum=0)

    @property
    def ignored(self) -> int | None:
        """Label that does not count; None if all count."""
        return self.ignore_index

    def counted(self, labels: NDArray[Any]) -> float:
        """Sum of the weights of the labels that count."""
        if self.ignore_index is None and not self.class_weights:
            return float(len(labels))
        counting = labels if self.ignore_index is None else labels[labels != self.ignore_index]
        return float(np.sum(np.asarray(self.class_weights)[counting])) if self.class_weights else float(counting.size)


@dataclass(frozen=True, kw_only=True)
class MeanSquaredError(Loss):
    """Mean of (outputs - labels)², for outputs and float32 labels of the same shape."""

    name = "mse"
    _labels = "numbers"


@dataclass(frozen=True, kw_only=True)
class MeanAbsoluteError(Loss):
    """Mean of |outputs - labels|, for outputs and float32 labels of the same shape."""

    name = "l1"
    _labels = "numbers"


@dataclass(frozen=True, kw_only=True)
class Huber(Loss):
    """Mean of ½ d² where |d| < δ, and of δ (|d| - ½ δ) elsewhere, with d = outputs - labels, of the same shape.

    Args:
        delta: Difference δ from which on the loss grows linearly.
    """

    name = "huber"
    _labels = "numbers"
    delta: float = option(1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(Loss):
    """Mean of -p y log σ(z) - (1 - y) log(1 - σ(z)), for outputs z and float32 labels y in [0, 1] of the same shape.

    Args:
        pos_weight: Weight p of yes against no.
    """

    name = "bce"
    _labels = "probabilities"
    pos_weight: float = option(1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class OwnLoss(Loss):
    """Loss of the user's own, a function or module in torch from outputs and labels to a number.

    Args:
        function: `file.py:name` or `package.module:name` at export; its name alone in a bundle, whose graph has it.
        kind: Kind of the labels: classes int64, or float32 of the outputs' shape.
        mean: Whether it is a mean over the rows of a batch, so that a batch can be split; found out at export.
    """

    name = "own"
    function: str = option(metavar="FILE.py:NAME")
    kind: Kind = option("numbers")
    mean: bool = option(True)

    @property
    def labels(self) -> Kind:
        """Kind of the labels."""
        return self.kind

    @property
    def divisible(self) -> bool:
        """Whether the loss of a batch is the mean of those of its parts, weighted by their rows."""
        return self.mean


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss for loss in (CrossEntropy, MeanSquaredError, MeanAbsoluteError, Huber, BinaryCrossEntropy, OwnLoss)
}
"""Losses by name."""


def find_loss(text: str) -> Loss:
    """Loss that a text stands for.

    Raises:
        InputError: There is none of that name, or an option does not fit.

    >>> str(find_loss("cross_entropy:label_smoothing=0.1,class_weights=1,2.5"))
    'cross_entropy:label_smoothing=0.1,class_weights=1,2.5'
    >>> find_loss("losses.py:focal:kind=classes")
    OwnLoss(weight=1.0, function='losses.py:focal', kind='classes', mean=True)
    """
    own = _OWN.fullmatch(text)
    if own is not None and own["where"] not in LOSSES:
        options = f",{own['options']}" if own["options"] else ""
        text = f"{OwnLoss.name}:function={own['where']}:{own['name']}{options}"
    loss: Loss = choose(LOSSES, text, key="loss")
    return loss


_OWN = re.compile(r"(?P<where>[^:=]+):(?P<name>[A-Za-z_]\w*)(:(?P<options>.*))?")


def find_head(text: str) -> tuple[str | None, Loss]:
    """Name of an output, None if there is none, and its loss, from `OUTPUT=LOSS` or `LOSS`.

    Raises:
        InputError: There is no such loss, or an option does not fit.

    >>> find_head("age=l1:weight=0.5")
    ('age', MeanAbsoluteError(weight=0.5))
    """
    output, equals, loss = text.partition("=")
    if not equals or ":" in output:
        return None, find_loss(text)
    if not output.isidentifier():
        raise InputError(f"expected the name of an output before =, found {output!r}", key="loss")
    return output, find_loss(loss)
