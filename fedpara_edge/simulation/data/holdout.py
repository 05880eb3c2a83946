"""The rows that a client holds out for its own test: a share of all, whole groups at a time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def hold_out(sizes: NDArray[np.intp], share: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Hold out groups, in random order, as long as each brings the number of rows closer to a share of all.

    At least one is held out and, of several, one is kept.

    Args:
        sizes: Number of rows in each group, int [G].
        share: Share of the rows to hold out, in (0, 1).
        generator: Generator of the order.

    Returns:
        Whether each group is held out, bool [G].

    >>> int(hold_out(np.ones(10, int), 0.2, np.random.default_rng(0)).sum())
    2
    """
    held = np.zeros(len(sizes), np.bool_)
    missing, most = share * sizes.sum(), len(sizes) - 1
    for group in generator.permutation(len(sizes)):
        if abs(missing - sizes[group]) < abs(missing) and most > 0:
            held[group] = True
            missing -= sizes[group]
            most -= 1
    if not held.any():
        held[np.argmin(sizes)] = True
    return held


def fewest_rows(min_examples: int, share: float) -> int:
    """The fewest rows of which `hold_out` leaves `min_examples`, where each row is a group of its own.

    With a share of 0 these are `min_examples`.

    >>> fewest_rows(64, 0.2)
    80
    """
    if share == 0:
        return min_examples

    def enough(rows: int) -> bool:
        return rows - min(rows - 1, max(1, math.ceil(share * rows - 0.5))) >= min_examples

    few, many = min_examples, min_examples + 1
    while not enough(many):
        few, many = many, 2 * many
    while many - few > 1:  # each row more leaves as many to train on, or one more
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many
