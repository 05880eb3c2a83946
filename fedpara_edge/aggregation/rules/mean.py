"""The plain mean of the changes, Σ s_i x_i with the shares s_i of the updates."""

from __future__ import annotations

from dataclasses import dataclass

from fedpara_edge.aggregation.rules.rule import Vector, Weighing


@dataclass(frozen=True, kw_only=True)
class Mean(Weighing):
    """The plain mean."""

    name = "mean"
    weighted = True
    measures = False

    def weigh(self, gram: Vector, shares: Vector) -> Vector:  # noqa: ARG002
        """The shares themselves."""
        return shares
