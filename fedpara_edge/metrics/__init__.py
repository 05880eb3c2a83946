"""Metrics of predictions, by the kind of the labels, from counts that are added up batch by batch.

| labels        | metrics                                                                                        |
|---------------|------------------------------------------------------------------------------------------------|
| classes       | `accuracy`, `macro_f1`, `macro_recall`, `mean_iou`, `top3`, `top5`, `top10`                      |
| probabilities | `accuracy`, `f1`, `precision`, `recall`, `iou`: yes where the probability is above 1/2          |
| numbers       | `mae`, `rmse`: mean absolute error and root of the mean squared error                           |

Counts are all that is kept of the outputs, so a dataset may be of any size. Those of parts add up to those of the
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, Self

from numpy.typing import NDArray

from fedpara_edge.registry import Registry

Kind = Literal["classes", "probabilities", "numbers"]
"""Kinds of labels: classes in [0, C), numbers in [0, 1] for yes or no, or any numbers."""


class Counts(Protocol):
    """Counts of the predictions of some examples, from which metrics are computed."""

    def __add__(self, other: Self) -> Self:
        """Counts of the examples of both."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics by name, without those that these examples leave undefined."""
        ...

    def rows(self) -> list[dict[str, float | None]]:
        """Metrics of each class or label, by name, None where undefined; none if there is only one."""
        ...


COUNTERS: Mapping[Kind, Callable[[NDArray[Any], NDArray[Any]], Counts]] = Registry(
    __name__,
    {"classes": "classes:count_classes", "probabilities": "binary:count_binary", "numbers": "regression:sum_errors"},
)
"""Function that counts a batch's outputs [B, ...] and labels [B, ...], by the kind of the labels."""


def add_counts(counts: dict[str, Counts], further: Mapping[str, Counts]) -> None:
    """Add the counts of further examples, by the name of the array of labels, to those of earlier ones."""
    for name, found in further.items():
        counts[name] = counts[name] + found if name in counts else found


METRICS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "macro_recall": "macro recall",
    "mean_iou": "mean IoU",
    "top3": "top 3",
    "top5": "top 5",
    "top10": "top 10",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "iou": "IoU",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
}
"""Metrics of all kinds of labels by name, each as it is printed."""

SHARES = frozenset(METRICS) - {"mae", "rmse"}
"""Metrics in [0, 1]."""
