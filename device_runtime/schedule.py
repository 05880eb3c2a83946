"""Learning-rate schedules: pure functions of the position within a call and of the round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fedpara_edge.options import check, option

Shape = Literal["constant", "cosine", "linear", "steps"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

DROP_EVERY, DROP_FACTOR = 1, 0.1
"""Defaults of the schedule `steps`."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate changes.

    Args:
        lr: Peak of the learning rate in round 0.
        schedule: Shape over one call: `constant`; `cosine`, half a wave down to 0; `linear` down to 0; or `steps`,
            times `drop_factor` after every `drop_every` epochs.
        warmup_steps: Steps over which the rate first rises linearly; the shape takes up the steps after them.
        drop_every: Epochs between two drops, for `steps`; None for 1.
        drop_factor: Factor of each drop, for `steps`, in (0, 1]; None for 0.1.
        lr_decay: Factor for every round already behind the weights, in (0, 1]; FedPara's experiments use 0.992.

    Raises:
        InputError: A value is out of its range.
    """

    lr: float = option(0.05, above=0, help="Learning rate, the peak of its schedule.")
    schedule: Shape = option("constant", help="Shape of the learning rate over this call.")
    warmup_steps: int = option(0, minimum=0, help="Steps of linear warm-up.")
    drop_every: int | None = option(
        None,
        minimum=1,
        only=("schedule", ("steps",)),
        unset=str(DROP_EVERY),
        help="Epochs between drops of schedule steps.",
    )
    drop_factor: float | None = option(
        None,
        above=0,
        maximum=1,
        only=("schedule", ("steps",)),
        unset=str(DROP_FACTOR),
        help="Factor of each drop of schedule steps.",
    )
    lr_decay: float = option(1.0, above=0, maximum=1, help="Factor on the learning rate for each round.")

    def __post_init__(self) -> None:
        check(self)


def learning_rate_at(schedule: Schedule, *, step: int, steps: int, epochs: int, round: int) -> float:
    """The learning rate of one step.

    With W warm-up steps and T steps in all it is `lr · lr_decay ** round` times (step + 1) / W during the warm-up, and
    after it times f(p), p = (step − W) / (T − W) in [0, 1):

        constant 1      cosine (1 + cos πp) / 2      linear 1 − p      steps drop_factor ** ⌊epoch / drop_every⌋

    so that neither the first nor the last step has a rate of 0.

    Args:
        schedule: Schedule.
        step: Number of the step, from 0.
        steps: Number of steps in the whole call, equal in all epochs.
        epochs: Number of epochs in the whole call.
        round: Round of the weights that the call starts from.

    >>> schedule = Schedule(lr=0.4, schedule="linear")
    >>> [learning_rate_at(schedule, step=s, steps=4, epochs=1, round=0) for s in range(4)]
    [0.4, 0.30000000000000004, 0.2, 0.1]
    """
    warmup = schedule.warmup_steps
    peak = schedule.lr * schedule.lr_decay**round
    if step < warmup:
        return peak * (step + 1) / warmup
    position = (step - warmup) / (steps - warmup)
    match schedule.schedule:
        case "constant":
            return peak
        case "cosine":
            return peak * (1 + math.cos(math.pi * position)) / 2
        case "linear":
            return peak * (1 - position)
        case "steps":
            epoch = step * epochs // steps
            factor = DROP_FACTOR if schedule.drop_factor is None else schedule.drop_factor
            return peak * factor ** (epoch // (schedule.drop_every or DROP_EVERY))
