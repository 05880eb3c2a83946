"""What an engine is: the thing that runs training steps of a bundle."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What is done to the gradient g of a whole batch before the optimizer sees it.

        a = g + μ w + h,    then    a · min(1, max_norm / (‖a‖ + 1e-6))

    with w the trained tensors before the step and ‖·‖ the norm of all of them together. The affine term is what
    federated optimizers change: FedProx has h = −μ w_global, SCAFFOLD μ = 0 and h = c − c_i, FedDyn μ = α and
    h = −∇_i − α w_global. The clipping is `torch.nn.utils.clip_grad_norm_`.

    Args:
        max_norm: largest norm; infinite for no clipping.
        mu: μ, the same for all entries of the tensors that have it.
        mu_of: names of the tensors that have it; it is 0 for the others. None for all.
        h: float32 arrays of the tensors' shapes, by name; zero for the names left out, None for all. Engines keep what
            they made of it for as long as they get the same `Adjustment`: make a new one to change it.

    Raises:
        InputError: a number is out of its range.
    """

    max_norm: float = math.inf
    mu: float = 0.0
    mu_of: Collection[str] | None = None
    h: Mapping[str, NDArray[np.float32]] | None = None

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise InputError(f"max_norm: expected a positive number, found {self.max_norm!r}")
        if not math.isfinite(self.mu):
            raise InputError(f"mu: expected a finite number, found {self.mu!r}")

    @property
    def is_none(self) -> bool:
        """Whether it leaves every gradient as it is."""
        return math.isinf(self.max_norm) and self.mu == 0 and self.h is None


NONE = Adjustment()


class Engine(Protocol):
    """Trains and evaluates one bundle; holds the weights and the optimizer's state.

    A new engine starts from the bundle's initial weights with a fresh optimizer. Everything is deterministic: the same
    calls give the same results, also after `restore`.
    """

    name: str
    bundle: Bundle

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Set tensors (float32, of the layout's shapes) by name; the others and the optimizer stay as they are."""
        ...

    def step(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        *,
        learning_rate: float,
        seed: int,
        adjustment: Adjustment = NONE,
        micro_batches: int = 1,
    ) -> float:
        """Take one optimizer step on a batch x [B, ...], y [B, ...]; return the batch's mean loss before it.

        Args:
            x: inputs.
            y: labels.
            learning_rate: of this step.
            seed: decides everything random in the step (dropout), in [0, 2³¹).
            adjustment: what is done to the gradient.
            micro_batches: Number of micro-batches over which the gradient is accumulated (`micro_batches.split_batch`):
                less memory, and the same result but for rounding and the draws of dropout.
        """
        ...

    def evaluate(self, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, NDArray[np.float32]]:
        """The mean loss of a batch and the model's outputs [B, ...], without dropout and without gradients."""
        ...

    def read(self) -> dict[str, NDArray[np.float32]]:
        """Copies of all trained tensors (shared and personal), by name."""
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything a later `restore` needs to continue exactly: weights and optimizer state, as plain arrays."""
        ...

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what `state` returned."""
        ...
