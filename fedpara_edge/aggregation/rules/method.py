"""How changes are combined: a rule, what is mixed before it, and the space in which it measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedpara_edge.aggregation.rules.mean import Mean
from fedpara_edge.aggregation.rules.rule import Rule, Sorting, Vector, Weighing
from fedpara_edge.errors import InputError

if TYPE_CHECKING:
    from fedpara_edge.aggregation.rules.mixing import Mixing

Space = Literal["factors", "composed"]
"""Spaces in which a rule measures distances."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A rule with what belongs to it.

    Args:
        rule: The rule.
        mixing: Mixing in front of it; None for none.
        space: Space in which distances are measured.

    Raises:
        InputError: Nothing is measured, so that the space has no meaning.
    """

    rule: Rule = field(default_factory=Mean)
    mixing: Mixing | None = None
    space: Space = "factors"

    def __post_init__(self) -> None:
        if self.space == "composed" and not self.measures:
            raise InputError(
                f"expected factors with rule {self.rule.name}, which measures no distances, found composed; leave it "
                "out, or put the mixing nnm in front",
                key="space",
            )

    @property
    def measures(self) -> bool:
        """Whether inner products are needed."""
        return self.rule.measures or (self.mixing is not None and self.mixing.measures)

    @property
    def is_plain(self) -> bool:
        """Whether it is the mean of the changes themselves."""
        return self.mixing is None and isinstance(self.rule, Mean)

    @property
    def sorts(self) -> bool:
        """Whether each entry is combined on its own."""
        return isinstance(self.rule, Sorting)

    @property
    def weighted(self) -> bool:
        """Whether the numbers of examples count."""
        return self.rule.weighted and self.mixing is None

    def matrix(self, gram: Vector, base: str) -> Vector | None:
        """Matrix of the mixing, float64 [mixed, changes]; None if nothing is mixed."""
        return None if self.mixing is None else self.mixing.matrix(gram, base)

    def weigh(self, gram: Vector, shares: Vector, matrix: Vector | None) -> Vector:
        """Weights of the changes in the combination of a `Weighing`, float64 [changes].

        Args:
            gram: Inner products of the changes; any where nothing is measured.
            shares: Shares of the changes in a plain mean.
            matrix: Matrix of the mixing.
        """
        assert isinstance(self.rule, Weighing)
        if matrix is None:
            return self.rule.weigh(gram, shares)
        mixed = matrix @ gram @ matrix.T
        return np.asarray(matrix.T @ self.rule.weigh(mixed, np.full(len(mixed), 1 / len(mixed))))

    def to_json(self) -> dict[str, Any]:
        """Rule, mixing and space, plain data for `json.dumps`."""
        mixing = None if self.mixing is None else self.mixing.to_json()
        return {"rule": self.rule.to_json(), "mixing": mixing, "space": self.space}
