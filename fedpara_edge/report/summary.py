"""What the report compares: the arms, each averaged over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedpara_edge.report.curve import Curve, Numbers
from fedpara_edge.report.results import Line

RATES_MBPS = (2, 10, 50)
"""Rates of a participant's link in Mbit/s, as in the paper's Tables 7 and 8."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What an arm needed to reach a target.

    Attributes:
        round: Round at which it reached the target, interpolated.
        bytes: Bytes of all participants together, up and down; None if they were not measured.
        ratio: Bytes of the reference over these; None without both, or where one of the two sends nothing.
        seeds: Number of seeds that the accuracy is averaged over.
    """

    round: float
    bytes: float | None
    ratio: float | None
    seeds: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmSummary:
    """One arm, averaged over its seeds.

    Attributes:
        name: Name of the arm.
        about: Facts about the arm, from the metrics.
        accuracy: Accuracy by evaluated round.
        total_bytes: Bytes of all participants together, up and down, from the first round on.
        gap: Aggregation gap, relative.
        factor_norm: Norm of all factors.
        weight_norm: Norm of all composed weights.
        last_round: Last round that was evaluated in any arm, or in this one if it has fewer rounds; 0 if none was.
        final: Accuracy after that round, of every seed that has one.
        rounds: Last round of every seed.
        unfinished: Reason why a seed is unfinished, or has lost its accuracy, by the number of the seed.
        round_bytes: Bytes per round of all participants together, up and down, mean over rounds and seeds.
        participant_bytes: Bytes per round of one participant, likewise.
        train_seconds: Computing time of one participant per round, mean over rounds and seeds.
        clients: Accuracy of every client of every seed on its own test share, [clients].
        ranks: Numerical rank of every composed weight when last measured, mean over the seeds.
        full_ranks: Largest rank that each weight can have; empty if the run does not tell.
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
        """Seconds per round that a participant sends and receives, at a rate in Mbit/s."""
        return None if self.participant_bytes is None else 8 * self.participant_bytes / (1e6 * rate_mbps)

    def round_seconds(self, rate_mbps: float) -> float | None:
        """Seconds per round of a participant, computing and sending, at a rate in Mbit/s."""
        sending = self.sending_seconds(rate_mbps)
        return None if sending is None or self.train_seconds is None else self.train_seconds + sending

    def bytes_until(self, number: float) -> float | None:
        """Bytes sent until a round, interpolated within the round."""
        if self.total_bytes is None:
            return 0.0 if self.sends_nothing else None
        curve = self.total_bytes
        if number > curve.rounds[-1]:
            return None
        return float(np.interp(number, [0.0, *curve.rounds], [0.0, *curve.mean]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Summary:
    """All arms of a run.

    Attributes:
        arms: Arms in the order of the plan.
        reference: Name of the arm that the others are compared with.
        targets: Accuracies to reach, ascending.
        is_planned: Whether the plan names the target.
        notes: Problems with the reference, and arms and seeds that are missing or unfinished, one line each.
    """

    arms: tuple[ArmSummary, ...]
    reference: str
    targets: tuple[float, ...]
    is_planned: bool
    notes: tuple[str, ...] = ()

    def arm(self, name: str) -> ArmSummary:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def curves(self, of: Callable[[ArmSummary], Curve | None]) -> list[tuple[ArmSummary, Curve]]:
        """The arms that have a measure, each with its curve."""
        return [(arm, curve) for arm in self.arms if (curve := of(arm)) is not None]

    def reached(self, arm: ArmSummary, target: float) -> Reached | None:
        """What an arm needed to reach a target; None if it did not reach it."""
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
