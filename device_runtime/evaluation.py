"""How good the weights in an engine are on a dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass

from device_runtime.batches import ordered_batches
from device_runtime.data import Dataset
from device_runtime.engines.protocol import Engine
from fedpara_edge.errors import DivergedError, InputError
from fedpara_edge.formats.accuracy import count_correct


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Args:
        loss: mean over the examples.
        accuracy: share of the labels predicted correct, in [0, 1]; None for `mse`.
        examples: number of examples.
    """

    loss: float
    accuracy: float | None
    examples: int


def evaluate(engine: Engine, dataset: Dataset, batch_size: int) -> Evaluation:
    """Mean loss and accuracy over all rows, each counted once.

    A class counts as predicted right if its output is the largest along axis 1 (`cross_entropy`), a binary label if the
    output is above 0 exactly where the label is above 1/2 (`bce`).

    Args:
        engine: holding the weights to judge.
        dataset: the examples.
        batch_size: rows at a time; it decides the memory needed and nothing else.

    Raises:
        InputError: the batch size is not positive, or a row does not fit.
        DivergedError: the loss is not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: expected an integer of at least 1, found {batch_size}")
    loss_sum, correct, labels, seen = 0.0, 0, 0, 0
    for x, y in ordered_batches(dataset, batch_size):
        loss, outputs = engine.evaluate(x, y)
        if not math.isfinite(loss):
            raise DivergedError(
                f"{dataset.path}: rows {seen} to {seen + len(x) - 1}: expected a finite loss, found {loss}: "
                "these weights diverged; take those of an earlier round"
            )
        loss_sum += loss * len(x)
        correct += count_correct(dataset.loss, outputs, y)
        labels += y.size
        seen += len(x)
    accuracy = None if dataset.loss == "mse" else correct / labels
    return Evaluation(loss=loss_sum / seen, accuracy=accuracy, examples=seen)
