"""The protocol of an engine, which runs the training steps of a bundle, and the adjustment of its gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.interface import ArraySpec

Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name, with as many rows each."""
Given = NDArray[Any] | Arrays
"""Arrays by name, or the array itself where the model has only one."""


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """Adjustment of the gradient g of a whole batch before the optimizer sees it.

        a = g + μ w + h,    then    a · min(1, max_norm / (‖a‖ + 1e-6))

    with w the trained tensors before the step and ‖·‖ the norm of all of them together. Federated optimizers change
    the affine term: FedProx has h = −μ w_global, SCAFFOLD μ = 0 and h = c − c_i, FedDyn μ = α and
    h = −∇_i − α w_global. Clipping is that of `torch.nn.utils.clip_grad_norm_`.

    Args:
        max_norm: Largest norm; infinite for no clipping.
        mu: Factor μ, the same for all entries of the tensors in `mu_of`.
        mu_of: Names of the tensors to which μ applies, where it is 0 for the others; None for all tensors.
        h: Summands h, float32 arrays of the tensors' shapes by name, zero for names left out; None for all zero.
            Engines cache what they make of them for as long as they get the same `Adjustment`: make a new one to change
            them.

    Raises:
        InputError: A number is out of its range.
    """

    max_norm: float = math.inf
    mu: float = 0.0
    mu_of: Collection[str] | None = None
    h: Mapping[str, NDArray[np.float32]] | None = None

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise InputError(f"expected a positive number, found {self.max_norm!r}", key="max_norm")
        if not math.isfinite(self.mu):
            raise InputError(f"expected a finite number, found {self.mu!r}", key="mu")

    @property
    def is_none(self) -> bool:
        """Whether every gradient is left as it is."""
        return math.isinf(self.max_norm) and self.mu == 0 and self.h is None


NONE = Adjustment()


def named(given: Given, specs: Sequence[ArraySpec]) -> Arrays:
    """Arrays by name, in the order of their specifications.

    Raises:
        InputError: There is one array for several specifications, or an array of one is missing.

    >>> x = np.zeros(2)
    >>> named(x, [ArraySpec("x", (), "float32")]) == {"x": x}
    True
    """
    arrays = given if isinstance(given, Mapping) else {spec.name: given for spec in specs[:1]}
    missing = [repr(spec.name) for spec in specs if spec.name not in arrays]
    if missing:
        raise InputError(f"expected arrays by name, found none of {', '.join(missing)}; pass them in a dict")
    return {spec.name: arrays[spec.name] for spec in specs}


@dataclass(frozen=True)
class Outcome:
    """Result of an evaluation of one batch.

    Args:
        losses: Mean loss of each head times its weight, in the order of the bundle's interface.
        outputs: Outputs [B, ...] of the heads by name.
    """

    losses: tuple[float, ...]
    outputs: Mapping[str, NDArray[np.float32]]

    @property
    def loss(self) -> float:
        """Loss of the batch, the sum over the heads."""
        return math.fsum(self.losses)


class Engine(Protocol):
    """Engine that trains and evaluates one bundle, and holds the weights and the state of the optimizer.

    A new engine starts from the bundle's initial weights with a fresh optimizer. Everything is deterministic: the same
    calls give the same results, also after `restore`.

    Attributes:
        name: Name of the engine, as in a bundle's manifest.
        bundle: Bundle with which the engine was opened.
    """

    name: str
    bundle: Bundle

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Set some tensors by name (float32, of the layout's shapes); the others and the optimizer stay as they are.

        Those that are held for updates (`Layout.held`) can be set as well; they are no part of `read` and `state`.
        """
        ...

    def step(
        self,
        x: Given,
        y: Given,
        *,
        learning_rate: float,
        seed: int,
        adjustment: Adjustment = NONE,
        micro_batches: int = 1,
    ) -> float:
        """Take one optimizer step on a batch, and return the batch's mean loss before it.

        Args:
            x: Inputs [B, ...] by name, or the only one.
            y: Labels [B, ...] by name, or the only one.
            learning_rate: Learning rate of this step.
            seed: Seed of everything random in the step (dropout), in [0, 2³¹).
            adjustment: Adjustment of the gradient.
            micro_batches: Number of micro-batches over which the gradient is accumulated (`micro_batches.split_batch`):
                less memory, and the same result except for rounding and the draws of dropout.
        """
        ...

    def evaluate(self, x: Given, y: Given) -> Outcome:
        """Mean losses of a batch and outputs of the model, without dropout and without gradients."""
        ...

    def read(self) -> dict[str, NDArray[np.float32]]:
        """Copies of all tensors that training changes (shared and personal, statistics included), by name."""
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """Weights and optimizer state as plain arrays, from which a later `restore` continues exactly."""
        ...

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a state that `state` returned."""
        ...


@runtime_checkable
class Formed(Protocol):
    """Engine that has the training step in several forms."""

    form: str

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms that the bundle has, the ordinary one first."""
        ...
