"""Evaluation of the weights in an engine on a dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from device_runtime.batches import ordered_batches
from device_runtime.data import Dataset
from device_runtime.engines.protocol import Engine
from device_runtime.loading import load_weights
from device_runtime.nonfinite import cause_in_evaluation
from fedpara_edge.errors import DivergedError, InputError
from fedpara_edge.formats.accuracy import count_correct, count_labels, without_ignored
from fedpara_edge.metrics import COUNTERS, Counts, add_counts


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of an evaluation.

    Args:
        examples: Number of examples.
        losses: Sum of each loss over what it counts: examples, or the labels that count, each by its weight.
        counted: Weight of what each loss counts.
        correct: Number of labels that are predicted correctly.
        labels: Number of labels that can be predicted correctly; 0 if all are numbers.
        counts: Counts from which all metrics are computed, by the name of the array of labels.
    """

    examples: int
    losses: tuple[float, ...]
    counted: tuple[float, ...]
    correct: int
    labels: int
    counts: Mapping[str, Counts] = field(default_factory=dict, repr=False, compare=False)

    @property
    def loss(self) -> float:
        """Mean loss over what it counts; of several outputs, the sum of their losses."""
        return sum(total / (counted or 1.0) for total, counted in zip(self.losses, self.counted, strict=True))

    @property
    def accuracy(self) -> float | None:
        """Fraction of the labels that are predicted correctly, in [0, 1]; None if all labels are numbers."""
        return self.correct / self.labels if self.labels else None

    def metric(self, name: str) -> float | None:
        """Loss or a metric (`fedpara_edge.metrics`); None where the labels have none of that name."""
        if name in ("loss", "accuracy"):
            return float(value) if (value := getattr(self, name)) is not None else None
        return next((found[name] for each in self.counts.values() if name in (found := each.metrics())), None)


def evaluate(
    engine: Engine,
    dataset: Dataset,
    batch_size: int = 256,
    *,
    weights: Path | str | None = None,
    state: Path | str | None = None,
) -> Evaluation:
    """Mean loss, accuracy and counts for further metrics over all rows, each counted once.

    A class is predicted correctly if its output is the largest along axis 1 (`cross_entropy`), a binary label if the
    output is above 0 exactly where the label is above 1/2 (`bce`).

    Args:
        engine: Engine with the weights to evaluate.
        dataset: Examples to evaluate on.
        batch_size: Rows at a time, which affects the memory needed and nothing else.
        weights: Weights file to load first; None for the weights that the engine holds.
        state: State folder with the device's personal tensors, to load with `weights`; None for those of the engine.

    Raises:
        InputError: The batch size is not positive, a row does not fit, or the weights or the state folder are missing.
        WrongBundleError: The weights or the state belong to another bundle, or are damaged.
        DivergedError: The loss is not finite.
    """
    if weights is not None:
        load_weights(engine, Path(weights), state=None if state is None else Path(state))
    elif state is not None:
        raise InputError(f"expected with weights, found {state} without", key="state")
    if batch_size < 1:
        raise InputError(f"expected an integer of at least 1, found {batch_size}", key="batch_size")
    heads = dataset.interface.heads
    loss_sums, divisors = np.zeros(len(heads)), np.zeros(len(heads))
    correct, labels, seen = 0, 0, 0
    counts: dict[str, Counts] = {}
    for x, y in ordered_batches(dataset, batch_size):
        outcome = engine.evaluate(x, y)
        rows = np.arange(seen, seen + len(next(iter(x.values()))))
        if not math.isfinite(outcome.loss):
            raise DivergedError(
                f"{dataset.path}: rows {seen} to {rows[-1]}: expected a finite loss, found {outcome.loss}: "
                f"{cause_in_evaluation(engine, dataset, rows)}"
            )
        counted = np.array([head.loss.counted(y[head.label.name]) for head in heads])
        loss_sums, divisors = loss_sums + counted * outcome.losses, divisors + counted
        for head in heads:
            outputs, label = outcome.outputs[head.output.name], y[head.label.name]
            known = without_ignored(head.loss, label)
            add_counts(counts, {head.label.name: COUNTERS[head.loss.labels](outputs, known)})
            correct += count_correct(head.loss, outputs, label)
            labels += count_labels(head.loss, label)
        seen += len(rows)
    return Evaluation(
        examples=seen,
        losses=tuple(loss_sums.tolist()),
        counted=tuple(divisors.tolist()),
        correct=correct,
        labels=labels,
        counts=counts,
    )


def overall(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Evaluation on the examples of several together.

    >>> one = Evaluation(examples=30, losses=(30.0,), counted=(30.0,), correct=15, labels=30)
    >>> other = Evaluation(examples=10, losses=(20.0,), counted=(10.0,), correct=10, labels=10)
    >>> together = overall([one, other])
    >>> together.loss, together.accuracy
    (1.25, 0.625)
    """
    counts: dict[str, Counts] = {}
    for evaluation in evaluations:
        add_counts(counts, evaluation.counts)
    return Evaluation(
        examples=sum(evaluation.examples for evaluation in evaluations),
        losses=tuple(map(sum, zip(*(evaluation.losses for evaluation in evaluations), strict=True))),
        counted=tuple(map(sum, zip(*(evaluation.counted for evaluation in evaluations), strict=True))),
        correct=sum(evaluation.correct for evaluation in evaluations),
        labels=sum(evaluation.labels for evaluation in evaluations),
        counts=counts,
    )
