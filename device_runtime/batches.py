"""Order and batches in which an epoch visits the rows of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.data import Batch, Dataset
from fedpara_edge.errors import InputError, counted


def batches_per_epoch(examples: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Number of batches in an epoch over `examples` rows; without `drop_last` the last may be smaller.

    Raises:
        InputError: `drop_last` would leave no batch.

    >>> batches_per_epoch(70, 32), batches_per_epoch(70, 32, drop_last=True)
    (3, 2)
    """
    if drop_last and examples < batch_size:
        raise InputError(
            f"expected at least one whole batch of {counted(batch_size, 'row')}, found {counted(examples, 'row')}; "
            "use smaller batches or keep the last one",
            key="drop_last",
        )
    return examples // batch_size if drop_last else -(-examples // batch_size)


def epoch_order(examples: int, *, seed: int, epoch: int) -> NDArray[Any]:
    """Order [N] in which an epoch visits the rows: a permutation that depends on the arguments alone.

    >>> sorted(epoch_order(5, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    order = np.arange(examples, dtype=np.uint32 if examples < 1 << 32 else np.int64)
    np.random.Generator(np.random.PCG64([seed, epoch])).shuffle(order)
    return order


def epoch_batches(
    dataset: Dataset, *, batch_size: int, seed: int, epoch: int, drop_last: bool = False, first: int = 0
) -> Iterator[Batch]:
    """Batches of one epoch in shuffled order, from batch number `first` on.

    Raises:
        InputError: A row does not fit, or `drop_last` would leave no batch.
    """
    count = batches_per_epoch(dataset.examples, batch_size, drop_last=drop_last)
    order = epoch_order(dataset.examples, seed=seed, epoch=epoch)
    for batch in range(first, count):
        yield dataset.rows(order[batch * batch_size : (batch + 1) * batch_size])


def ordered_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Batches of all rows in their order, `batch_size` at a time.

    Raises:
        InputError: A row does not fit.
    """
    for start in range(0, dataset.examples, batch_size):
        yield dataset.rows(np.arange(start, min(start + batch_size, dataset.examples)))
