"""The client's half of an algorithm: what a device adds to its gradients, and what it keeps from round to round.

With x the global weights and w those being trained, every algorithm changes the gradient g by an affine term,
g + μ w + h, on the trained shared tensors alone; personal ones follow their own gradient, and statistics none. What a
device keeps starts at 0 and is brought up to date after the last step with Δ, the change as every reader of the update
decodes it.

The change as decoded, and not as trained, so that the server, which knows nothing else, keeps the exact mean of what
the devices keep, with lossy codecs as well. No algorithm sends a tensor besides Δ: what the server needs in addition is
a number in the update's metrics.

A gradient is clipped after the affine term has been added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms.algorithm import Algorithm
from fedpara_edge.errors import DivergedError

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a local training starts with.

    Args:
        weights: Global weights x, all shared tensors that are trained, by name.
        kept: Tensors that the device kept in its last round, by name; empty for zeros.
        control: Tensors that the server gives its devices besides the weights, by name; empty for zeros.
        rate_sum: Sum Σ_k η_k of the learning rates of all steps.
    """

    weights: Tensors
    kept: Tensors = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    rate_sum: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Term:
    """The affine term μ w + h of the shared tensors' gradients.

    Args:
        mu: Factor μ.
        h: Summand h, float32 by name; None for zeros.
    """

    mu: float = 0.0
    h: Tensors | None = None


@dataclass(frozen=True, kw_only=True)
class ClientAlgorithm(Algorithm):
    """What a client algorithm has to say; as it stands, plain local training.

    Attributes:
        group: Name under which the state folder holds what the device keeps; None for nothing.
        controlled: Whether the device needs the server's state of the round.
        paired: Whether it goes with the server algorithm of the same name alone.
        states_steps: Whether its updates state numbers that depend on the steps taken (`metrics`).
    """

    group: ClassVar[str | None] = None
    controlled: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    states_steps: ClassVar[bool] = False

    def check_optimizer(self, constants: Mapping[str, Any]) -> None:
        """Refuse an optimizer with which the algorithm would be wrong.

        Args:
            constants: Optimizer of a bundle, as its manifest states it.

        Raises:
            InputError: A constant does not fit.
        """

    def term(self, start: Start) -> Term:  # noqa: ARG002
        """What is added to the gradients of the shared tensors."""
        return Term()

    def keep(self, start: Start, sent: Tensors) -> dict[str, NDArray[np.float32]]:  # noqa: ARG002
        """What the device keeps for its next round: a tensor for every shared one, or nothing.

        Args:
            start: Start of the training.
            sent: Change of the shared tensors as decoded, by name.

        Raises:
            DivergedError: A value is beyond float32.
        """
        return {}

    def metrics(self, start: Start) -> dict[str, float]:  # noqa: ARG002
        """Numbers that the update states for the server."""
        return {}


def or_zero(tensors: Tensors, name: str) -> NDArray[np.float32]:
    """One of some tensors; zero where there are none."""
    return tensors[name] if tensors else np.zeros((), np.float32)


def to_float32(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """What a device keeps of one tensor, rounded to float32.

    Raises:
        DivergedError: A value is beyond float32.
    """
    with np.errstate(over="ignore"):
        rounded = np.asarray(values, np.float32)
    if not np.isfinite(rounded).all():
        raise DivergedError(
            f"tensor {name!r}: expected a finite state of the algorithm, found one beyond float32: the training "
            "diverged or took too small steps; change the learning rate"
        )
    return rounded
