"""Learning-rate schedules: pure functions of the position within a call and of the round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fedpara_edge.errors import InputError

Shape = Literal["constant", "cosine", "linear", "steps"]
SHAPES: tuple[Shape, ...] = get_args(Shape)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate changes.

    Args:
        shape: over one call: `constant`; `cosine`, half a wave down to 0; `linear` down to 0; or `steps`, times
            `drop_factor` after every `drop_every_epochs` epochs.
        warmup_steps: the rate rises linearly over so many first steps; the shape takes up the steps after them.
        drop_every_epochs: for `steps`.
        drop_factor: for `steps`; in (0, 1].
        round_decay: factor for every round already behind the weights, in (0, 1]; FedPara's experiments use 0.992.

    Raises:
        InputError: a field is out of its range.
    """

    shape: Shape = "constant"
    warmup_steps: int = 0
    drop_every_epochs: int = 1
    drop_factor: float = 0.1
    round_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError(f"schedule: expected one of {', '.join(SHAPES)}, found {self.shape!r}")
        for name, least in (("warmup_steps", 0), ("drop_every_epochs", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name}: expected an integer of at least {least}, found {value!r}")
        for name in ("drop_factor", "round_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise InputError(f"{name}: expected a number above 0 and at most 1, found {value!r}")


def learning_rate_at(
    schedule: Schedule, learning_rate: float, *, step: int, steps: int, epochs: int, round: int
) -> float:
    """The learning rate of one step.

    With W warm-up steps and T steps in all it is `learning_rate · round_decay ** round` times (step + 1) / W during the
    warm-up, and after it times f(p), p = (step − W) / (T − W) in [0, 1):

        constant 1      cosine (1 + cos πp) / 2      linear 1 − p      steps drop_factor ** ⌊epoch / drop_every_epochs⌋

    so that neither the first nor the last step has a rate of 0.

    Args:
        schedule: the schedule.
        learning_rate: its peak in round 0.
        step: the step, from 0.
        steps: steps in the whole call, as many in each epoch.
        epochs: epochs in the whole call.
        round: round of the weights that the call starts from.

    >>> [learning_rate_at(Schedule(shape="linear"), 0.4, step=s, steps=4, epochs=1, round=0) for s in range(4)]
    [0.4, 0.30000000000000004, 0.2, 0.1]
    """
    warmup = schedule.warmup_steps
    peak = learning_rate * schedule.round_decay**round
    if step < warmup:
        return peak * (step + 1) / warmup
    position = (step - warmup) / (steps - warmup)
    match schedule.shape:
        case "constant":
            return peak
        case "cosine":
            return peak * (1 + math.cos(math.pi * position)) / 2
        case "linear":
            return peak * (1 - position)
        case "steps":
            epoch = step * epochs // steps
            return peak * schedule.drop_factor ** (epoch // schedule.drop_every_epochs)
