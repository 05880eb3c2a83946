"""How many labels a model's outputs predict right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.formats.bundle import Loss


def predicted(loss: Loss, outputs: NDArray[Any]) -> NDArray[np.int64] | None:
    """The labels that outputs [B, ...] stand for: a class [B, ...] is the largest along axis 1 (`cross_entropy`), a
    binary label is 1 where the output is above 0 (`bce`); None for `mse`.

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
    """How many of the labels y [B, ...] the outputs [B, ...] predict; a binary label above 1/2 is 1. 0 for `mse`.

    >>> count_correct("bce", np.array([[2.0], [-1.0], [0.5]]), np.array([[1.0], [1.0], [1.0]]))
    2
    """
    labels = predicted(loss, outputs)
    if labels is None:
        return 0
    return int(np.count_nonzero(labels.reshape(y.shape) == (y > 0.5 if loss == "bce" else y)))
