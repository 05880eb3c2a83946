"""What the report compares: all arms, each with all its seeds together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedpara_edge.report.curve import Curve, Numbers
from fedpara_edge.report.results import Line

RATES_MBPS = (2, 10, 50)
"""Of the paper's Tables 7 and 8."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What it took an arm to reach a target.

    Args:
        round: interpolated.
        bytes: up and down, of all participants together; None if they were not measured.
        ratio: bytes of the reference arm over these; None without both, or where one of them sends nothing.
        seeds: of which the accuracy is the mean.
    """

    round: float
    bytes: float | None
    ratio: float | None
    seeds: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmSummary:
    """One arm, all seeds together.

    Args:
        name: of the arm.
        about: the line about it.
        accuracy: by evaluated round.
        total_bytes: up and down from the first round on, of all participants together.
        gap: aggregation gap, relative.
        factor_norm: of all factors.
        weight_norm: of all composed weights.
        last_round: the last that was evaluated of any arm, or of this one if it has fewer rounds; 0 if none was.
        final: accuracy after that round, of each seed that has one there.
        rounds: how far each seed has come.
        unfinished: for each seed that did not come to its end, or lost its accuracy before it, by its number, why.
        round_bytes: mean over rounds and seeds, up and down, of all participants together.
        participant_bytes: the same of one participant.
        train_seconds: mean of a participant's computing, over rounds and seeds.
        clients: accuracy of each client of each seed on its own test share, [clients].
        ranks: numerical rank of each composed weight, mean over the seeds, when it was last measured.
        full_ranks: the largest that each can have; empty if the run does not tell.
    """

    name: str
    about: Line
    accuracy: Curve | None
    total_bytes: Curve | None
    gap: Curve | None
    factor_norm: Curve | None
    weight_norm: Curve | None
    last_round: int
    final: tuple[float, ...]
    rounds: tuple[int, ...]
    unfinished: Mapping[int, str]
    round_bytes: float | None
    participant_bytes: float | None
    train_seconds: float | None
    clients: Numbers
    ranks: Mapping[str, float] = field(default_factory=dict)
    full_ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def sends_nothing(self) -> bool:
        """Whether every client trains on its own."""
        return bool(self.about.get("local_only")) or self.round_bytes == 0

    @property
    def is_complete(self) -> bool:
        """Whether all seeds have an accuracy after `last_round`."""
        return len(self.final) == len(self.rounds)

    def sending_seconds(self, rate_mbps: float) -> float | None:
        """How long a participant sends and receives in a round at a rate in Mbit/s."""
        return None if self.participant_bytes is None else 8 * self.participant_bytes / (1e6 * rate_mbps)

    def round_seconds(self, rate_mbps: float) -> float | None:
        """Computing and sending."""
        sending = self.sending_seconds(rate_mbps)
        return None if sending is None or self.train_seconds is None else self.train_seconds + sending

    def bytes_until(self, number: float) -> float | None:
        """Sent until a round, interpolated within it."""
        if self.total_bytes is None:
            return 0.0 if self.sends_nothing else None
        curve = self.total_bytes
        if number > curve.rounds[-1]:
            return None
        return float(np.interp(number, [0.0, *curve.rounds], [0.0, *curve.mean]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Summary:
    """All arms.

    Args:
        arms: in the order of the plan.
        reference: name of the arm that the others are compared with.
        targets: accuracies to reach, ascending.
        is_planned: whether the plan names the target.
        notes: What is wrong with the reference, and arms and seeds that are missing or unfinished, one line each.
    """

    arms: tuple[ArmSummary, ...]
    reference: str
    targets: tuple[float, ...]
    is_planned: bool
    notes: tuple[str, ...] = ()

    def arm(self, name: str) -> ArmSummary:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def reached(self, arm: ArmSummary, target: float) -> Reached | None:
        """What it took an arm to reach a target; None if it did not."""
        curve = arm.accuracy
        number = None if curve is None else curve.reaches(target)
        if curve is None or number is None:
            return None
        sent = arm.bytes_until(number)
        ratio = None
        if arm.name == self.reference:
            ratio = 1.0
        elif sent:
            of_reference = self.reached(self.arm(self.reference), target)
            ratio = of_reference.bytes / sent if of_reference is not None and of_reference.bytes else None
        return Reached(round=number, bytes=sent, ratio=ratio, seeds=curve.seeds)
