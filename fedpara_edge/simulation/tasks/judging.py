"""How good weights are, in a worker process: the device runtime's evaluation, in pieces that can be added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from device_runtime.data import open_data
from device_runtime.evaluation import evaluate
from device_runtime.loading import load_weights
from fedpara_edge.errors import DivergedError
from fedpara_edge.simulation.tasks import engines
from fedpara_edge.simulation.tasks.engines import Model, bundle_at

BATCH_ROWS = 256
PIECE_ROWS = 512
"""Rows of a common test set that one worker takes at a time: whole batches, and as many whatever the number of workers,
so that this changes no bit."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Weights, and the examples to evaluate them on.

    Args:
        model: what they are weights of.
        weights: the file.
        data: folder with the examples.
        state: state folder with a client's personal tensors; None for the initial ones.
        rows: first of the examples to take, and the one after the last; None for all.
    """

    model: Model
    weights: Path
    data: Path
    state: Path | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good they are, as sums.

    Args:
        examples: number of examples.
        loss_sum: of their losses; None if it is not finite.
        right: labels predicted right; None for a loss without accuracy, or if `loss_sum` is.
        labels: number of labels.
    """

    examples: int
    loss_sum: float | None
    right: int | None
    labels: int

    def to_json(self) -> dict[str, Any]:
        """Means over the examples, plain data for `json.dumps`."""
        return {
            "accuracy": None if self.right is None else self.right / self.labels,
            "loss": None if self.loss_sum is None else self.loss_sum / self.examples,
            "examples": self.examples,
        }


def add_up(scores: Iterable[Score]) -> Score:
    """The score on all examples together.

    >>> add_up([Score(examples=2, loss_sum=1.0, right=2, labels=2), Score(examples=1, loss_sum=2.0, right=0, labels=1)])
    Score(examples=3, loss_sum=3.0, right=2, labels=3)
    """
    found = list(scores)
    losses = [score.loss_sum for score in found if score.loss_sum is not None]
    right = [score.right for score in found if score.right is not None]
    return Score(
        examples=sum(score.examples for score in found),
        loss_sum=sum(losses) if len(losses) == len(found) else None,
        right=sum(right) if len(right) == len(found) else None,
        labels=sum(score.labels for score in found),
    )


def judge(judgings: Sequence[Judging]) -> list[Score]:
    """Evaluate one after the other.

    Raises:
        FedparaError: as `device_runtime.evaluate`, but for a loss that is not finite.
    """
    return [_judge(judging) for judging in judgings]


def _judge(judging: Judging) -> Score:
    bundle, engine = bundle_at(judging.model.bundle), engines.engines.fresh(judging.model)
    dataset = open_data(judging.data, bundle.manifest)
    if judging.rows is not None:
        rows = slice(*judging.rows)
        dataset = replace(dataset, x=dataset.x[rows], y=dataset.y[rows])
    load_weights(engine, judging.weights, state=judging.state)
    try:
        found = evaluate(engine, dataset, BATCH_ROWS)
    except DivergedError:
        return Score(examples=dataset.examples, loss_sum=None, right=None, labels=dataset.y.size)
    return Score(
        examples=found.examples,
        loss_sum=found.loss * found.examples,
        right=None if found.accuracy is None else round(found.accuracy * dataset.y.size),
        labels=dataset.y.size,
    )
