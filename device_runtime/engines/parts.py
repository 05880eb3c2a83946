"""A batch in parts, whose gradients add up to that of the whole: as much memory as the largest part needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """Some rows of a batch.

    Args:
        x: their inputs.
        y: their labels.
        share: of the rows of the batch, in (0, 1]; the weight of their mean loss and its gradient.
        seed: decides what is random in this part.
        first: whether it is the first part.
        last: whether it is the last part.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    share: float
    seed: int
    first: bool
    last: bool


def cut(x: NDArray[Any], y: NDArray[Any], *, parts: int, seed: int) -> Iterator[Part]:
    """Cut a batch into parts whose numbers of rows differ by at most one, the larger first, none empty.

    Args:
        x: inputs [B, ...].
        y: labels [B, ...].
        parts: how many; B if there are fewer rows.
        seed: of the step.

    >>> rows = np.arange(7)
    >>> [(part.x.tolist(), round(part.share, 2)) for part in cut(rows, rows, parts=3, seed=0)]
    [([0, 1, 2], 0.43), ([3, 4], 0.29), ([5, 6], 0.29)]
    """
    rows = len(x)
    parts = min(parts, rows)
    start = 0
    for number in range(parts):
        end = start + rows // parts + (number < rows % parts)
        yield Part(
            x[start:end],
            y[start:end],
            share=(end - start) / rows,
            seed=part_seed(seed, number),
            first=number == 0,
            last=number == parts - 1,
        )
        start = end


def part_seed(seed: int, part: int) -> int:
    """The seed of a part, in [0, 2³¹): that of the step for the first, a hash of it and the number for the others.

    >>> part_seed(7, 0)
    7
    >>> len({part_seed(seed, part) for seed in range(10) for part in range(10)})
    100
    """
    if part == 0:
        return seed
    return int(np.random.SeedSequence([seed, part], spawn_key=(2,)).generate_state(1)[0]) >> 1
