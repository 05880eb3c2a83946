"""Counts of answers to yes or no, and their metrics.

A label is yes above 1/2, and predicted so where the output, a logit, is above 0. Where there are several labels along
axis 1, F1, precision, recall and IoU of yes are means over those for which they are defined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class BinaryCounts:
    """Counts of L labels that are yes or no.

    Args:
        answers: Number of answers to each label, [L].
        correct: Number of them that are predicted right, [L].
        labels: Number of them that are yes, [L].
        predicted: Number of predictions that are yes, [L].
        hits: Number of predictions that are yes and right, [L].
    """

    answers: Integers
    correct: Integers
    labels: Integers
    predicted: Integers
    hits: Integers

    def __add__(self, other: BinaryCounts) -> BinaryCounts:
        return BinaryCounts(**{name: count + getattr(other, name) for name, count in vars(self).items()})

    def metrics(self) -> dict[str, float]:
        """Metrics by name, without those that are defined for no label."""
        answers = int(self.answers.sum())
        if not answers:
            return {}
        of_yes = {
            name: [value for row in self._rows() if (value := row[name]) is not None]
            for name in ("f1", "precision", "recall", "iou")
        }
        means = {name: float(np.mean(values)) for name, values in of_yes.items() if values}
        return {"accuracy": int(self.correct.sum()) / answers, **means}

    def rows(self) -> list[dict[str, float | None]]:
        """Metrics of each label, in their order; none if there is only one."""
        return self._rows() if len(self.labels) > 1 else []

    def _rows(self) -> list[dict[str, float | None]]:
        return [
            {
                "labels": yes,
                "recall": hits / yes if yes else None,
                "precision": hits / predicted if predicted else None,
                "f1": 2 * hits / (yes + predicted) if yes + predicted else None,
                "iou": hits / (yes + predicted - hits) if yes + predicted else None,
            }
            for yes, predicted, hits in zip(
                self.labels.tolist(), self.predicted.tolist(), self.hits.tolist(), strict=True
            )
        ]


def count_binary(outputs: NDArray[Any], labels: NDArray[Any]) -> BinaryCounts:
    """Counts of a batch.

    Args:
        outputs: Logits [B] or [B, L, ...].
        labels: Labels in [0, 1], of the same shape.

    >>> counts = count_binary(np.array([[2.0], [-1.0], [0.5]]), np.array([[1.0], [1.0], [1.0]]))
    >>> counts.metrics()["accuracy"] == counts.metrics()["recall"] == 2 / 3
    True
    """
    found, wanted = (_by_label(array) for array in (outputs > 0, labels.reshape(outputs.shape) > 0.5))
    return BinaryCounts(
        answers=np.full(wanted.shape[1], len(wanted), np.int64),
        correct=(found == wanted).sum(axis=0),
        labels=wanted.sum(axis=0),
        predicted=found.sum(axis=0),
        hits=(found & wanted).sum(axis=0),
    )


def _by_label(answers: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Answers [N, L] from [B] or [B, L, ...]."""
    if answers.ndim == 1:
        return answers[:, None]
    return np.moveaxis(answers, 1, -1).reshape(-1, answers.shape[1])
