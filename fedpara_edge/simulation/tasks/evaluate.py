"""How good weights are: the device runtime's evaluation, as sums that can be added up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_runtime.data import open_data
from device_runtime.evaluation import evaluate
from device_runtime.loading import load_weights
from fedpara_edge.errors import DivergedError
from fedpara_edge.formats.accuracy import count_labels
from fedpara_edge.simulation.tasks.engines import Model, bundle_at, fresh_engine

BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Tally:
    """An evaluation as sums.

    Args:
        examples: Number of examples.
        loss_sum: Sum of their losses; None if it is not finite.
        correct: Number of labels predicted right; None for a loss without accuracy, or if `loss_sum` is.
        labels: Number of labels.
    """

    examples: int
    loss_sum: float | None
    correct: int | None
    labels: int

    def to_json(self) -> dict[str, Any]:
        """Means over the examples, plain data for `json.dumps`."""
        return {
            "accuracy": None if self.correct is None else self.correct / self.labels,
            "loss": None if self.loss_sum is None else self.loss_sum / self.examples,
            "examples": self.examples,
        }


def add_up(tallies: Iterable[Tally]) -> Tally:
    """The evaluation on the examples of several together.

    >>> one = Tally(examples=2, loss_sum=1.0, correct=2, labels=2)
    >>> add_up([one, Tally(examples=1, loss_sum=2.0, correct=0, labels=1)])
    Tally(examples=3, loss_sum=3.0, correct=2, labels=3)
    """
    found = list(tallies)
    losses = [tally.loss_sum for tally in found if tally.loss_sum is not None]
    correct = [tally.correct for tally in found if tally.correct is not None]
    return Tally(
        examples=sum(tally.examples for tally in found),
        loss_sum=sum(losses) if len(losses) == len(found) else None,
        correct=sum(correct) if len(correct) == len(found) else None,
        labels=sum(tally.labels for tally in found),
    )


def evaluate_weights(
    *, model: Model, weights: Path, data: Path, state: Path | None = None, rows: tuple[int, int] | None = None
) -> Tally:
    """Evaluate weights on some examples.

    Args:
        model: Model that the weights belong to.
        weights: Weights file.
        data: Folder with the examples.
        state: State folder with a client's personal tensors; None for the initial ones.
        rows: First of the examples to take, and the one after the last; None for all.

    Raises:
        FedparaError: A file is damaged.
    """
    bundle, engine = bundle_at(model.bundle), fresh_engine(model)
    dataset = open_data(data, bundle.manifest)
    if rows is not None:
        dataset = dataset.slice(*rows)
    load_weights(engine, weights, state=state)
    labels = sum(count_labels(head.loss, dataset.arrays[head.label.name]) for head in bundle.interface.heads)
    try:
        found = evaluate(engine, dataset, BATCH_ROWS)
    except DivergedError:
        return Tally(examples=dataset.examples, loss_sum=None, correct=None, labels=labels)
    return Tally(
        examples=found.examples,
        loss_sum=found.loss * found.examples,
        correct=None if found.accuracy is None else round(found.accuracy * labels),
        labels=labels,
    )
