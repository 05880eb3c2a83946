"""Sums of the errors of predicted numbers, and their metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ErrorSums:
    """Sums over the errors of all numbers.

    Args:
        numbers: Number of numbers.
        absolute: Sum of the absolute errors.
        squared: Sum of the squared errors.
    """

    numbers: int
    absolute: float
    squared: float

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            numbers=self.numbers + other.numbers,
            absolute=self.absolute + other.absolute,
            squared=self.squared + other.squared,
        )

    def metrics(self) -> dict[str, float]:
        """Mean absolute error and root of the mean squared error."""
        if not self.numbers:
            return {}
        return {"mae": self.absolute / self.numbers, "rmse": math.sqrt(self.squared / self.numbers)}

    def rows(self) -> list[dict[str, float | None]]:
        """Nothing, as numbers are not told apart."""
        return []


def sum_errors(outputs: NDArray[Any], labels: NDArray[Any]) -> ErrorSums:
    """Sums of a batch.

    Args:
        outputs: Numbers [B, ...].
        labels: Numbers of the same shape.

    >>> sum_errors(np.array([1.0, 2.0]), np.array([0.0, 4.0])).metrics()["mae"]
    1.5
    """
    errors = outputs.astype(np.float64).reshape(-1) - labels.astype(np.float64).reshape(-1)
    return ErrorSums(numbers=errors.size, absolute=float(np.abs(errors).sum()), squared=float(np.square(errors).sum()))
