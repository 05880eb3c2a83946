"""How good weights are: the device runtime's evaluation, as sums that can be added up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from device_runtime.data import open_data
from device_runtime.evaluation import Evaluation, evaluate, overall
from device_runtime.loading import load_weights
from fedpara_edge.errors import DivergedError
from fedpara_edge.simulation.tasks.engines import Model, bundle_at, fresh_engine

BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Tally:
    """An evaluation that may have failed.

    Args:
        examples: Number of examples.
        found: Evaluation; None if a loss is not finite.
    """

    examples: int
    found: Evaluation | None

    def to_json(self) -> dict[str, Any]:
        """Means over what counts, plain data for `json.dumps`."""
        return {
            "accuracy": None if self.found is None else self.found.accuracy,
            "loss": None if self.found is None else self.found.loss,
            "examples": self.examples,
        }


def add_up(tallies: Iterable[Tally]) -> Tally:
    """The evaluation on the examples of several together; one that failed leaves nothing of the others."""
    tallies = list(tallies)
    found = [tally.found for tally in tallies if tally.found is not None]
    examples = sum(tally.examples for tally in tallies)
    return Tally(examples=examples, found=overall(found) if len(found) == len(tallies) else None)


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
    try:
        found = evaluate(engine, dataset, BATCH_ROWS)
    except DivergedError:
        return Tally(examples=dataset.examples, found=None)
    return Tally(examples=dataset.examples, found=replace(found, counts={}))
