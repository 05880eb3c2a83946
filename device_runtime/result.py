"""What a training call came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a training call.

    Args:
        client: Name of the client in the update.
        round: Round of the weights from which the call started.
        examples: Number of local examples.
        steps: Number of steps in the whole call.
        resumed_from_step: Steps that an earlier, interrupted run of the call had taken; 0 if there was none.
        seconds: Time that all steps took, earlier runs included, in seconds.
        losses: Mean training loss of each epoch.
        update_bytes: Size of the update file in bytes.
        spent: ε of all updates of the device so far; None without noise.
    """

    client: str
    round: int
    examples: int
    steps: int
    resumed_from_step: int
    seconds: float
    losses: tuple[float, ...]
    update_bytes: int
    spent: float | None = None

    @property
    def log_fields(self) -> dict[str, Any]:
        """Fields of the log event `training_finished`, but for the file of the update."""
        return {
            "client": self.client,
            "round": self.round,
            "examples": self.examples,
            "steps": self.steps,
            "resumed_from_step": self.resumed_from_step,
            "seconds": round(self.seconds, 3),
            "loss": self.losses[-1],
            "bytes": self.update_bytes,
        }
