"""Causes of a loss that is not finite, as far as they can be seen: weights, single rows, or the model itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.data import Dataset
from device_runtime.engines.protocol import Engine
from fedpara_edge.errors import FedparaError

MOST_ROWS = 3
"""Rows that a message names; where more give a loss that is not finite, no single one is at fault."""


def cause_in_training(
    engine: Engine,
    dataset: Dataset,
    rows: NDArray[Any],
    *,
    origin: Mapping[str, NDArray[np.float32]],
    step: int,
    learning_rate: float,
) -> str:
    """What is known of a loss in training that is not finite, and the remedy.

    Args:
        engine: Engine that took the step; it is left with other weights.
        dataset: Examples.
        rows: Row numbers [B] of the batch.
        origin: Tensors with which the call started, by name.
        step: Number of steps that were taken before in the same call.
        learning_rate: Learning rate of the step.
    """
    engine.load(origin)
    alone = _rows_alone(engine, dataset, rows)
    if alone:
        return alone
    if not step:
        return (
            "no step was taken before, so the learning rate is not at fault; look at the weights that the training "
            "starts from, at the scale of the inputs (--mean and --std of the export) and at the model"
        )
    unless = "; if that does not help, look for a gradient that is not finite, as that of a root or norm at 0"
    return f"the training diverged; lower the learning rate ({learning_rate:g}){unless if step == 1 else ''}"


def cause_in_evaluation(engine: Engine, dataset: Dataset, rows: NDArray[Any]) -> str:
    """What is known of a loss in an evaluation that is not finite, and the remedy, with the weights in the engine."""
    return _rows_alone(engine, dataset, rows) or (
        "these weights diverged, or the inputs are on another scale than those of training; use the weights of an "
        "earlier round, or look at the data"
    )


def _rows_alone(engine: Engine, dataset: Dataset, rows: NDArray[Any]) -> str:
    """The rows whose loss is not finite by itself, in words; empty if they are none, many, or the whole batch."""
    found: list[int] = []
    try:
        for row in _bad_rows(engine, dataset, rows):
            if len(found) == MOST_ROWS:
                return ""
            found.append(row)
    except FedparaError:  # from a model that takes no single row
        return ""
    if not found or len(found) == len(rows) > 1:
        return ""
    found.sort()
    listed = f"rows {', '.join(map(str, found[:-1]))} and {found[-1]} give" if found[1:] else f"row {found[0]} gives"
    return f"{dataset.path}: {listed} it alone: correct or leave out such examples, which may be nothing but padding"


def _bad_rows(engine: Engine, dataset: Dataset, rows: NDArray[Any]) -> Iterator[int]:
    """Rows whose loss is not finite by itself, found by halves."""
    if math.isfinite(engine.evaluate(*dataset.rows(rows)).loss):
        return
    if len(rows) == 1:
        yield int(rows[0])
        return
    half = (len(rows) + 1) // 2
    yield from _bad_rows(engine, dataset, rows[:half])
    yield from _bad_rows(engine, dataset, rows[half:])
