"""The protocol of a rule: from the changes of a round to one change that a few hostile ones among them don't decide.

With x_i the changes of n updates (or of what `mixing` makes of them), there are two kinds. A `Weighing` gives a
combination Σ w_i x_i whose weights depend on the inner products <x_i, x_j> alone, the Gram matrix, so that it needs no
more than that of values of any number. A `Sorting` gives each entry from the values of that entry alone, so that it can
be fed a few entries of all updates at a time.

`share` of a rule is the share of the updates that may be bad; the number f of them is rounded up, and fewer than half.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.options import check

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule. Its fields are its options (`fedpara_edge.options`).

    Attributes:
        name: Name that a user types.
        weighted: Whether the number of examples of an update counts.
        measures: Whether it needs the Gram matrix.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str]
    weighted: ClassVar[bool] = False
    measures: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def to_json(self) -> dict[str, Any]:
        """Name and options, plain data for `json.dumps`."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Weighing(Rule):
    """A rule that gives a combination of the changes."""

    measures = True

    def weigh(self, gram: Vector, shares: Vector) -> Vector:
        """Weights of the changes, float64 [changes].

        Args:
            gram: Inner products of the changes, float64 [changes, changes].
            shares: Shares of the changes in a plain mean, float64 [changes], which sum to 1.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Sorting(Rule):
    """A rule that gives each entry from the values of that entry."""

    def combine(self, rows: NDArray[np.float32]) -> Vector:
        """The combined change, float64 [entries].

        Args:
            rows: Changes, finite, float32 [changes, entries]; overwritten.
        """
        raise NotImplementedError


def count_bad(share: float, changes: int) -> int:
    """The number f of changes that may be bad.

    >>> [count_bad(0.2, changes) for changes in (1, 2, 3, 5, 11)]
    [0, 0, 1, 1, 3]
    """
    return min(math.ceil(share * changes - 1e-9), (changes - 1) // 2)


def squared_distances(gram: Vector) -> Vector:
    """Squared distances of the changes from each other, float64 [changes, changes]."""
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None] - 2 * gram, 0)
