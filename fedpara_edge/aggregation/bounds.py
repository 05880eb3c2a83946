"""Bounds on what one client can do to a round, whatever its update says.

With d_i the change of update i, n_i the examples that it claims, and med the median over the round:

    norm       d_i ← d_i min(1, c med ||d|| / ||d_i||)          c = `max_norm`
    examples   n_i ← min(n_i, c med n)                          c = `max_examples`
    share      s_i = n_i / Σ n, and nobody's above c            c = `max_share`, or 1.5 / updates if that is more
    weights    the composed weights are finite and did not explode (`composed`)

What a client lacks of its share goes to the others in proportion. The norm is that of all trained tensors together;
running statistics have one of their own, as they are of another size, and so has each further mean that an algorithm
asks for, such as that of Δ_i / R_i for scaffold. All bind from three updates on: of two, none is in the majority. A
median over an even number of examples is the lower one.

The defaults are such that from five updates on, whoever claims most examples and the largest change moves the weights
by less than the others do together, if these agree: 0.33 times 1.5 medians against 0.67 times 1. Where 30 % of the
clients send -10 times their change, a bound of 1.5 medians leaves more of the accuracy than one of 2 does, and where
none does, as much (`benchmarks/attacks.md`); at 1, half of all honest changes would be scaled down.

Clipping to a multiple of the median is norm bounding (Sun et al. 2019, arXiv 1911.07963) with the threshold taken from
the round, of which more than half must be honest for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms import Weighting
from fedpara_edge.options import check, option

NAMES = ("norm", "examples", "share", "weights")
MAJORITY = 3
"""Fewest updates of which one can be outvoted."""
LEAST_SHARES = 1.5
"""Equal shares that every client may have."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much one client can do to a round.

    Args:
        max_norm: Largest norm of a change in medians of the round; a larger change is scaled down.
        max_examples: Most examples that count for a client, in medians of the round.
        max_share: Largest share of one client in the total weight, unless 1.5 equal shares are more.
        unbounded: Names of the bounds to leave out, of `NAMES`.

    Raises:
        InputError: A value is out of its range.
    """

    max_norm: float = option(
        1.5, minimum=1, help="Largest norm of a change, in medians of the round; larger ones are scaled down."
    )
    max_examples: float = option(
        10.0, minimum=1, help="Most examples that count for one client, in medians of the round."
    )
    max_share: float = option(
        0.33, above=0, maximum=1, help="Largest share of one client in the total weight, or 1.5 equal shares if more."
    )
    unbounded: tuple[str, ...] = option((), choices=NAMES, help=f"Bound to leave out: {', '.join(NAMES)}; repeatable.")

    def __post_init__(self) -> None:
        check(self)

    def binds(self, name: str) -> bool:
        """Whether the bound of that name is not left out."""
        return name not in self.unbounded

    def count(self, examples: Sequence[int]) -> list[int]:
        """The numbers of examples that count.

        >>> Bounds(max_examples=2).count([10, 1 << 40, 15])
        [10, 30, 15]
        """
        if not self.binds("examples") or len(examples) < MAJORITY:
            return list(examples)
        most = int(self.max_examples * sorted(examples)[(len(examples) - 1) // 2])
        return [min(each, most) for each in examples]

    def shares(self, examples: Sequence[int], weighting: Weighting) -> NDArray[np.float64]:
        """Shares of the updates in the mean, float64 [updates], which sum to 1.

        >>> Bounds().shares([10, 10, 180], "examples")
        array([0.25, 0.25, 0.5 ])
        """
        if weighting == "equal":
            return np.full(len(examples), 1 / len(examples))
        counted = self.count(examples)
        total = sum(counted)
        shares = np.array([each / total for each in counted])
        if not self.binds("share") or len(shares) < MAJORITY:
            return shares
        return _limited(shares, max(self.max_share, LEAST_SHARES / len(shares)))

    def factors(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Factors that bring norms down to their bound, float64 [updates]; 1 where there is nothing to do.

        Args:
            norms: Norms of the same changes in several respects, float64 [respects, updates].

        >>> Bounds(max_norm=2).factors(np.array([[1.0, 1.0, 8.0], [3.0, 1.0, 1.0]]))
        array([0.66666667, 1.        , 0.25      ])
        """
        factors = np.ones(norms.shape[1])
        for row in norms if self.binds("norm") else ():
            most = self.max_norm * typical(row)
            above = row > most
            factors[above] = np.minimum(factors[above], most / row[above])
        return factors


UNBOUNDED = Bounds(unbounded=NAMES)
"""No bounds at all."""


def typical(norms: NDArray[np.float64]) -> float:
    """Median of the norms that are not 0; infinite where there are too few of them for a majority."""
    moved = norms[norms > 0]
    return float(np.median(moved)) if len(moved) >= MAJORITY else np.inf


def _limited(shares: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Shares of which none is above `most`; what is cut off goes to the rest in proportion."""
    limited, full = shares, np.zeros(len(shares), bool)
    while (above := ~full & (limited > most)).any():
        full |= above
        limited = np.where(full, most, shares * ((1 - most * full.sum()) / shares[~full].sum()))
    return limited
