"""Micro-batches: a batch split so that the gradients of the pieces add up to its own (gradient accumulation).

A step then needs only as much memory as its largest micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from device_runtime.engines.protocol import Arrays


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive rows of a batch.

    Args:
        x: Inputs of these rows, by name.
        y: Labels of these rows, by name.
        share: Fraction of the batch's rows, in (0, 1]; the weight of their mean loss and of its gradient.
        seed: Seed of everything random in this micro-batch.
        first: Whether this is the first micro-batch of its batch.
        last: Whether this is the last micro-batch of its batch.
    """

    x: Arrays
    y: Arrays
    share: float
    seed: int
    first: bool
    last: bool


def split_batch(x: Arrays, y: Arrays, *, micro_batches: int, seed: int) -> Iterator[MicroBatch]:
    """Split a batch into micro-batches whose sizes differ by at most one row, the larger ones first, none empty.

    Args:
        x: Inputs [B, ...], by name.
        y: Labels [B, ...], by name.
        micro_batches: Number of micro-batches; a batch with fewer rows is split into B.
        seed: Seed of the step.

    >>> x, y = {"x": np.arange(7)}, {"y": np.arange(7)}
    >>> [(part.x["x"].tolist(), round(part.share, 2)) for part in split_batch(x, y, micro_batches=3, seed=0)]
    [([0, 1, 2], 0.43), ([3, 4], 0.29), ([5, 6], 0.29)]
    """
    rows = len(next(iter(x.values())))
    count = min(micro_batches, rows)
    start = 0
    for number in range(count):
        end = start + rows // count + (number < rows % count)
        yield MicroBatch(
            {name: array[start:end] for name, array in x.items()},
            {name: array[start:end] for name, array in y.items()},
            share=(end - start) / rows,
            seed=micro_batch_seed(seed, number),
            first=number == 0,
            last=number == count - 1,
        )
        start = end


def micro_batch_seed(seed: int, number: int) -> int:
    """Seed of a micro-batch, in [0, 2³¹): the step's own for the first, a hash of it and the number for the others.

    >>> micro_batch_seed(7, 0)
    7
    >>> len({micro_batch_seed(seed, number) for seed in range(10) for number in range(10)})
    100
    """
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number], spawn_key=(2,)).generate_state(1)[0]) >> 1
