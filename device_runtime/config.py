"""What a training call is told: `TrainConfig`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from device_runtime.engines.protocol import NONE, Adjustment
from device_runtime.schedule import Schedule
from fedpara_edge.algorithms import ClientAlgorithm
from fedpara_edge.algorithms.client import Term
from fedpara_edge.algorithms.fedavg import FedAvgClient
from fedpara_edge.errors import InputError

NO_TERM = Term()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train in one call.

    Args:
        epochs: passes over the data.
        batch_size: rows in a step.
        learning_rate: the schedule's peak in round 0.
        schedule: how the learning rate changes.
        seed: decides, with round and step, the order of the rows and all that is random in a step.
        drop_last: leave out the last batch of an epoch when it is smaller.
        clip_norm: scale the gradient of each batch down to this norm where it is larger; None for as it is.
        parts: take the gradient of each batch in so many parts, for less memory.
        algorithm: what is added to the gradients, and what the device keeps for its next round.
        checkpoint_seconds: time between two saves of the progress.
        checkpoint_steps: save after so many steps as well; None for by time only.

    Raises:
        InputError: a field is out of its range.
    """

    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.05
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    drop_last: bool = False
    clip_norm: float | None = None
    parts: int = 1
    algorithm: ClientAlgorithm = field(default_factory=FedAvgClient)
    checkpoint_seconds: float = 30.0
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("epochs", 1, 1 << 20),
            ("batch_size", 1, 1 << 32),
            ("seed", 0, (1 << 32) - 1),
            ("parts", 1, 1 << 32),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{name}: expected an integer from {least} to {most}, found {value!r}")
        if not _is_number(self.learning_rate) or self.learning_rate <= 0:
            raise InputError(f"learning_rate: expected a positive number, found {self.learning_rate!r}")
        if self.clip_norm is not None and (not _is_number(self.clip_norm) or self.clip_norm <= 0):
            raise InputError(f"clip_norm: expected a positive number or none, found {self.clip_norm!r}")
        if not _is_number(self.checkpoint_seconds) or self.checkpoint_seconds < 0:
            raise InputError(f"checkpoint_seconds: expected a number of at least 0, found {self.checkpoint_seconds!r}")
        if self.checkpoint_steps is not None and (type(self.checkpoint_steps) is not int or self.checkpoint_steps < 1):
            raise InputError(
                f"checkpoint_steps: expected an integer of at least 1 or none, found {self.checkpoint_steps!r}"
            )

    def adjustment(self, term: Term = NO_TERM, *, shared: Collection[str] | None = None) -> Adjustment:
        """What is done to the gradients.

        Args:
            term: what the algorithm adds.
            shared: names of the tensors it is added to, where there are others; None for all.
        """
        max_norm = math.inf if self.clip_norm is None else self.clip_norm
        adjustment = Adjustment(max_norm=max_norm, mu=term.mu, mu_of=shared if term.mu else None, h=term.h)
        return NONE if adjustment.is_none else adjustment

    def is_save_due(self, *, seconds: float, steps: int) -> bool:
        """Whether to save the progress, so long and so many steps after the last time."""
        every = self.checkpoint_steps
        return seconds >= self.checkpoint_seconds or (every is not None and steps >= every)

    def decisive(self) -> dict[str, Any]:
        """The fields that decide what is learned, as plain JSON data: all but when to save."""
        fields = {**asdict(self), "algorithm": self.algorithm.to_json()}
        del fields["checkpoint_seconds"], fields["checkpoint_steps"]
        return fields


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
