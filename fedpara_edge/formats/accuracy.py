"""Accuracy: the labels that a model's outputs predict, and how many of them are correct."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.losses import Loss


def predicted(loss: Loss, outputs: NDArray[Any]) -> NDArray[np.int64] | None:
    """Labels that outputs [B, ...] predict; None for a loss whose labels are numbers.

    A class is that of the largest output along axis 1; yes or no is 1 where the output is above 0.

    >>> from fedpara_edge.losses import find_loss
    >>> predicted(find_loss("cross_entropy"), np.array([[0.1, 2.0, -1.0]]))
    array([1])
    """
    match loss.labels:
        case "classes":
            classes: NDArray[np.int64] = outputs.argmax(axis=1)
            return classes
        case "probabilities":
            return (outputs > 0).astype(np.int64)
        case "numbers":
            return None


def count_correct(loss: Loss, outputs: NDArray[Any], y: NDArray[Any]) -> int:
    """Number of labels y [B, ...] that outputs [B, ...] predict correctly; 0 for a loss whose labels are numbers.

    A label above 1/2 counts as yes, and one that the loss ignores not at all.

    >>> from fedpara_edge.losses import find_loss
    >>> count_correct(find_loss("bce"), np.array([[2.0], [-1.0], [0.5]]), np.array([[1.0], [1.0], [1.0]]))
    2
    """
    labels = predicted(loss, outputs)
    if labels is None:
        return 0
    wanted = y > 0.5 if loss.labels == "probabilities" else without_ignored(loss, y)
    return int(np.count_nonzero(labels.reshape(y.shape) == wanted))


def count_labels(loss: Loss, y: NDArray[Any]) -> int:
    """Number of labels y [B, ...] that can be predicted correctly: those that count, and are not numbers."""
    if loss.labels == "numbers":
        return 0
    return y.size if loss.ignored is None else int(np.count_nonzero(y != loss.ignored))


def without_ignored(loss: Loss, y: NDArray[Any]) -> NDArray[Any]:
    """Labels with -1, which is no class, in place of what does not count."""
    return y if loss.ignored is None else np.where(y == loss.ignored, -1, y.astype(np.int64))
