"""What an engine is: the thing that runs training steps of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """Trains and evaluates one bundle; holds the weights and the optimizer's state.

    A new engine starts from the bundle's initial weights with a fresh optimizer. Everything is deterministic: the same
    calls give the same results, also after `restore`.
    """

    name: str

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Set tensors (float32, of the layout's shapes) by name; the others and the optimizer stay as they are."""
        ...

    def step(self, x: NDArray[Any], y: NDArray[Any], *, learning_rate: float, seed: int) -> float:
        """Take one optimizer step on a batch x [B, ...], y [B, ...]; return the batch's mean loss before it.

        `seed` decides everything random in the step (dropout).
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
