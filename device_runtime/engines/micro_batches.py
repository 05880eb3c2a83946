"""Micro-batches: a batch split so that the gradients of the pieces add up to its own (gradient accumulation).

A step then needs only as much memory as its largest micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from device_runtime.engines.protocol import Arrays
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.interface import Head


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive rows of a batch.

    Args:
        x: Inputs of these rows, by name.
        y: Labels of these rows, by name.
        shares: Fraction of what the loss of each head counts in the batch, in [0, 1]; the weight of the loss of these
            rows and of its gradient. Where all labels count, that is the fraction of the rows.
        seed: Seed of everything random in this micro-batch.
        first: Whether this is the first micro-batch of its batch.
        last: Whether this is the last micro-batch of its batch.
    """

    x: Arrays
    y: Arrays
    shares: tuple[float, ...]
    seed: int
    first: bool
    last: bool


def split_batch(x: Arrays, y: Arrays, *, heads: Sequence[Head], micro_batches: int, seed: int) -> Iterator[MicroBatch]:
    """Split a batch into micro-batches whose sizes differ by at most one row, the larger ones first, none empty.

    Args:
        x: Inputs [B, ...], by name.
        y: Labels [B, ...], by name.
        heads: Heads of the model, whose losses say what counts.
        micro_batches: Number of micro-batches; a batch with fewer rows is split into B.
        seed: Seed of the step.

    Raises:
        InputError: A batch is to be split whose loss is not the mean of those of its parts.

    >>> from fedpara_edge.formats.interface import ArraySpec
    >>> from fedpara_edge.losses import find_loss
    >>> loss = find_loss("cross_entropy:ignore_index=9")
    >>> head = Head(ArraySpec("logits", (9,), "float32"), ArraySpec("y", (), "int64", 9), loss)
    >>> x, y = {"x": np.arange(7)}, {"y": np.array([0, 1, 2, 3, 9, 9, 9])}
    >>> [(p.x["x"].tolist(), p.shares) for p in split_batch(x, y, heads=[head], micro_batches=3, seed=0)]
    [([0, 1, 2], (0.75,)), ([3, 4], (0.25,)), ([5, 6], (0.0,))]
    """
    rows = len(next(iter(x.values())))
    count = min(micro_batches, rows)
    indivisible = [head.loss for head in heads if not head.loss.divisible]
    if count > 1 and indivisible:
        raise InputError(
            f"expected 1 with the loss {indivisible[0]}, which is no mean over the rows of a batch, found "
            f"{micro_batches}; train with smaller batches",
            key="micro_batches",
        )
    whole = [head.loss.counted(y[head.label.name]) for head in heads]
    start = 0
    for number in range(count):
        end = start + rows // count + (number < rows % count)
        labels = {name: array[start:end] for name, array in y.items()}
        parts = [head.loss.counted(labels[head.label.name]) for head in heads]
        yield MicroBatch(
            {name: array[start:end] for name, array in x.items()},
            labels,
            shares=tuple(part / of if of else 0.0 for part, of in zip(parts, whole, strict=True)),
            seed=micro_batch_seed(seed, number),
            first=number == 0,
            last=number == count - 1,
        )
        start = end


def refuse_parts(bundle: Bundle, micro_batches: int) -> None:
    """Refuse several micro-batches for a bundle with a Jacobian correction.

    Raises:
        InputError: It has one.
    """
    if micro_batches > 1 and bundle.manifest.optimizer.get("jacobian_correction"):
        raise InputError(
            f"expected 1, as the Jacobian correction of {bundle.path} needs the gradient of a whole batch, "
            f"found {micro_batches}; train with smaller batches, or export without --jacobian-correction",
            key="micro_batches",
        )


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
