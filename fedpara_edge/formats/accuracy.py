"""Accuracy: the labels that a model's outputs predict, and how many of them are correct."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.formats.bundle import Loss
from fedpara_edge.metrics import Kind

_KINDS: dict[Loss, Kind] = {"cross_entropy": "classes", "bce": "probabilities", "mse": "numbers"}


def kind_of(loss: Loss) -> Kind:
    """Kind of the labels that a loss takes."""
    return _KINDS[loss]


def predicted(loss: Loss, outputs: NDArray[Any]) -> NDArray[np.int64] | None:
    """Labels that outputs [B, ...] predict; None for `mse`.

    With `cross_entropy` a label is the class of the largest output along axis 1, with `bce` it is 1 where the output is
    above 0.

    >>> predicted("cross_entropy", np.array([[0.1, 2.0, -1.0]]))
    array([1])
    """
    match loss:
        case "cross_entropy":
            classes: NDArray[np.int64] = outputs.argmax(axis=1)
            return classes
        case "bce":
            return (outputs > 0).astype(np.int64)
        case "mse":
            return None


def count_correct(loss: Loss, outputs: NDArray[Any], y: NDArray[Any]) -> int:
    """Number of labels y [B, ...] that outputs [B, ...] predict correctly; 0 for `mse`.

    A binary label above 1/2 counts as 1.

    >>> count_correct("bce", np.array([[2.0], [-1.0], [0.5]]), np.array([[1.0], [1.0], [1.0]]))
    2
    """
    labels = predicted(loss, outputs)
    if labels is None:
        return 0
    return int(np.count_nonzero(labels.reshape(y.shape) == (y > 0.5 if loss == "bce" else y)))
