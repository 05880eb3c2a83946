"""Counts of predicted classes, and their metrics.

With h_c the labels of class c that are predicted right, n_c the labels and p_c the predictions of c:

    recall h_c / n_c,    precision h_c / p_c,    F1 2 h_c / (n_c + p_c),    IoU h_c / (n_c + p_c - h_c)

Macro recall (balanced accuracy) is the mean over the classes that have labels; macro F1 and mean IoU are means over
those that have labels or predictions. Top k is the fraction of the labels that are among the k largest outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RANKS = 10
TOP = (3, 5, 10)
MOST_CONFUSED = 256
"""Largest number of classes for which it is kept which is taken for which."""

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassCounts:
    """Counts of labels that are one of C classes.

    Args:
        labels: Number of labels of each class, [C].
        predicted: Number of predictions of each class, [C].
        hits: Number of labels of each class that are predicted right, [C].
        ranks: Number of labels whose output is the largest, the second largest, …, the tenth, [10].
        confusion: Number of labels of one class, the row, that are predicted as another, the column, [C, C]; None for
            more than 256 classes.
    """

    labels: Integers
    predicted: Integers
    hits: Integers
    ranks: Integers
    confusion: Integers | None

    def __add__(self, other: ClassCounts) -> ClassCounts:
        both = self.confusion is not None and other.confusion is not None
        return ClassCounts(
            labels=self.labels + other.labels,
            predicted=self.predicted + other.predicted,
            hits=self.hits + other.hits,
            ranks=self.ranks + other.ranks,
            confusion=self.confusion + other.confusion if both else None,  # type: ignore[operator]
        )

    def metrics(self) -> dict[str, float]:
        """Metrics by name; none without labels, and top k only of more than k classes."""
        count = int(self.labels.sum())
        if not count:
            return {}
        met = self.labels + self.predicted > 0
        return {
            "accuracy": int(self.hits.sum()) / count,
            "macro_f1": float(np.mean((2 * self.hits / np.maximum(self.labels + self.predicted, 1))[met])),
            "macro_recall": float(np.mean((self.hits / np.maximum(self.labels, 1))[self.labels > 0])),
            "mean_iou": float(np.mean((self.hits / np.maximum(self._union, 1))[met])),
            **{f"top{k}": int(self.ranks[:k].sum()) / count for k in TOP if k < len(self.labels)},
        }

    def rows(self) -> list[dict[str, float | None]]:
        """Metrics of each class, in their order."""
        columns = {
            "labels": [*map(int, self.labels)],
            "recall": _ratios(self.hits, self.labels),
            "precision": _ratios(self.hits, self.predicted),
            "f1": _ratios(2 * self.hits, self.labels + self.predicted),
            "iou": _ratios(self.hits, self._union),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @property
    def _union(self) -> Integers:
        union: Integers = self.labels + self.predicted - self.hits
        return union


def count_classes(outputs: NDArray[Any], labels: NDArray[Any]) -> ClassCounts:
    """Counts of a batch; a label that is no class is left out.

    Args:
        outputs: Outputs [B, C, ...]; the largest along axis 1 is predicted, the first of equal ones.
        labels: Classes [B, ...].

    >>> counts = count_classes(np.array([[0.1, 2.0, -1.0], [3.0, 0.0, 1.0]]), np.array([1, 2]))
    >>> counts.metrics()["accuracy"], counts.ranks[:2].tolist()
    (0.5, [1, 1])
    """
    classes = outputs.shape[1]
    flat, wanted = np.moveaxis(outputs, 1, -1).reshape(-1, classes), labels.reshape(-1).astype(np.int64)
    known = (wanted >= 0) & (wanted < classes)
    if not known.all():
        flat, wanted = flat[known], wanted[known]
    found, own = flat.argmax(axis=1), flat[np.arange(len(wanted)), wanted][:, None]
    rank = (flat > own).sum(axis=1) + ((flat == own) & (np.arange(classes) < wanted[:, None])).sum(axis=1)
    confusion = None
    if classes <= MOST_CONFUSED:
        confusion = np.bincount(wanted * classes + found, minlength=classes**2).reshape(classes, classes)
    return ClassCounts(
        labels=np.bincount(wanted, minlength=classes),
        predicted=np.bincount(found, minlength=classes),
        hits=np.bincount(wanted[found == wanted], minlength=classes),
        ranks=np.bincount(rank[rank < RANKS], minlength=RANKS),
        confusion=confusion,
    )


def _ratios(parts: Integers, wholes: Integers) -> list[float | None]:
    return [int(part) / int(whole) if whole else None for part, whole in zip(parts, wholes, strict=True)]
