"""FedAdam, FedYogi and FedAdagrad: the mean change as a gradient, each entry by its own size, on the server alone.

    server   m ← β₁ m + (1 - β₁) Δ                x ← x + η m / (√v + τ)
             v ← β₂ v + (1 - β₂) Δ²                            fedadam
             v ← v - (1 - β₂) Δ² sign(v - Δ²)                  fedyogi
             v ← v + Δ²                                        fedadagrad

The server keeps m and v, 0 and τ² before the first round; the starts are not corrected for. Nothing travels but x and
Δ; clients train plainly or with `fedprox`.

Source: Reddi et al. 2021 (FedOpt), arXiv 2003.00295, algorithm 2, which asks for v of at least τ²; Δ is weighted by
examples, as in their experiments. Flower's strategies of these names differ: there v starts at 0, FedAdam corrects the
learning rate for the starts (with the round plus one), and τ is 1e-9 unless told otherwise, where 1e-3 is what the
paper found best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedpara_edge.algorithms.server import LARGEST, ServerAlgorithm, Vector
from fedpara_edge.options import option


@dataclass(frozen=True, kw_only=True)
class Adaptive(ServerAlgorithm):
    """What the three have in common.

    Args:
        lr: Learning rate η, above 0.
        beta1: Decay β₁ of the first moment, from 0 to below 1.
        tau: Floor τ, above 0; the smaller, the more the entries are brought to one size.

    Raises:
        InputError: An option is out of range.
    """

    lr: float = option(0.01, above=0, help="Learning rate η of the server.")
    beta1: float = option(0.9, minimum=0, below=1, help="Decay β₁ of the first moment.")
    tau: float = option(1e-3, above=0, below=math.sqrt(LARGEST), help="Adaptivity τ.")

    groups = ("moment1", "moment2")

    def start(self, group: str) -> float:
        """0 for m and τ² for v."""
        return self.tau**2 if group == "moment2" else 0.0

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:  # noqa: ARG002
        """η m / (√v + τ) with the new m and v."""
        first = self.beta1 * kept["moment1"] + (1 - self.beta1) * means[0]
        second = self.second_moment(kept["moment2"], np.square(means[0]))
        return self.lr * first / (np.sqrt(second) + self.tau), {"moment1": first, "moment2": second}

    def second_moment(self, old: Vector, square: Vector) -> Vector:
        """The next v.

        Args:
            old: The v before.
            square: Δ².
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FedAdam(Adaptive):
    """A v that forgets at a constant rate.

    Args:
        beta2: Decay β₂ of the second moment, from 0 to below 1.
    """

    beta2: float = option(0.99, minimum=0, below=1, help="Decay β₂ of the second moment.")

    name = "fedadam"

    def second_moment(self, old: Vector, square: Vector) -> Vector:
        """β₂ v + (1 - β₂) Δ²."""
        return self.beta2 * old + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """A v that changes by no more than (1 - β₂) Δ² at a time."""

    name = "fedyogi"

    def second_moment(self, old: Vector, square: Vector) -> Vector:
        """v - (1 - β₂) Δ² sign(v - Δ²)."""
        return old - (1 - self.beta2) * square * np.sign(old - square)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    """A v that forgets nothing; without momentum, as in the paper's experiments, unless β₁ is given."""

    lr: float = option(0.1, above=0, help="Learning rate η of the server.")
    beta1: float = option(0.0, minimum=0, below=1, help="Decay β₁ of the first moment.")

    name = "fedadagrad"

    def second_moment(self, old: Vector, square: Vector) -> Vector:
        """v + Δ²."""
        return old + square
