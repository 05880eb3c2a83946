"""From what each seed has measured to what the report compares.

    curve            mean and standard deviation over the seeds, at the rounds that all seeds of the arm have come to
    smooth curve     the mean of each point and its two neighbours; the first and the last point as they are
    rounds to a      the first round at which the smooth curve of the accuracy is at least the target; between two
    target           evaluated rounds, interpolated linearly; never less than the first evaluated round
    bytes to it      sent up and down by all participants up to there, mean over the seeds; linear within a round
    ratio            bytes of the reference arm over bytes of this arm

Targets are the plan's, or else the highest point of the reference arm's smooth curve less 0.5 and 1 points, so that
the reference arm reaches them. The accuracy that an arm came to is that after the last round that was evaluated in the
whole run, of those seeds that have come to it with a finite loss: arms are only compared after the same round, but for
those that the plan gives fewer or more rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.report.results import ArmRun, Line, Results, SeedRun, number_of
from fedpara_edge.simulation.plan.plan import Plan

Numbers = NDArray[np.float64]

RATES_MBPS = (2, 10, 50)
"""Of the paper's Tables 7 and 8."""
BELOW_BEST = (0.005, 0.01)


@dataclass(frozen=True, eq=False)
class Curve:
    """A measure by round.

    Args:
        rounds: ascending, [N].
        mean: over the seeds, [N].
        sd: standard deviation of the seeds (n - 1), [N]; zeros for one seed.
        seeds: how many they are.
    """

    rounds: Numbers
    mean: Numbers
    sd: Numbers
    seeds: int

    @property
    def smooth(self) -> Numbers:
        """The mean of each point and its two neighbours, [N]; the first and the last as they are."""
        smooth = self.mean.copy()
        smooth[1:-1] = (self.mean[:-2] + self.mean[1:-1] + self.mean[2:]) / 3
        return smooth

    def reaches(self, target: float) -> float | None:
        """The round, interpolated, at which the smooth curve first is at least the target; None if it never is.

        >>> rounds, accuracy = np.array([2.0, 4.0]), np.array([0.4, 0.4])
        >>> Curve(rounds, accuracy, accuracy * 0, 1).reaches(0.4), Curve(rounds, accuracy, accuracy * 0, 1).reaches(0.5)
        (2.0, None)
        """
        smooth = self.smooth
        above = np.flatnonzero(smooth >= target)
        if not len(above):
            return None
        last = above[0]
        if last == 0:
            return float(self.rounds[0])
        return float(np.interp(target, smooth[last - 1 : last + 1], self.rounds[last - 1 : last + 1]))


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
        note: what is wrong with the reference, if anything.
    """

    arms: tuple[ArmSummary, ...]
    reference: str
    targets: tuple[float, ...]
    is_planned: bool
    note: str | None = None

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


def summarize(results: Results) -> Summary:
    """Everything the report shows, from everything that was measured."""
    plan = results.plan
    planned = {arm.name: arm.rounds for arm in plan.arms}
    ends = {arm.name: planned.get(arm.name, plan.rounds) for arm in results.arms}
    come_to = ((number, ends[arm.name]) for arm in results.arms for seed in arm.seeds for number in seed.rounds)
    last = max((number for number, end in come_to if plan.is_evaluated(number, last=end)), default=0)
    arms = tuple(_summarize(arm, _last_evaluated(plan, last, ends[arm.name])) for arm in results.arms)
    reference = _reference(arms, plan.reference)
    curve = reference.accuracy
    if plan.target is not None:
        targets: tuple[float, ...] = (plan.target,)
    else:
        targets = () if curve is None else tuple(sorted(float(curve.smooth.max()) - below for below in BELOW_BEST))
    note = None
    if plan.reference not in (None, reference.name):
        note = f"{plan.reference}, the plan's reference, has not begun: compared with {reference.name} instead"
    elif curve is None:
        note = f"{reference.name}, the reference, has no accuracy: nothing can be compared with it"
    return Summary(
        arms=arms,
        reference=reference.name,
        targets=targets,
        is_planned=plan.target is not None,
        note=note,
    )


def _last_evaluated(plan: Plan, last: int, end: int) -> int:
    """The last round up to `last` after which an arm of `end` rounds is evaluated; 0 if there is none."""
    rounds = range(min(last, end), 0, -1)
    return next((number for number in rounds if plan.is_evaluated(number, last=end)), 0)


def _reference(arms: Sequence[ArmSummary], planned: str | None) -> ArmSummary:
    """The arm of that name; else the one called dense, or the first, of those that send anything."""
    sending = [arm for arm in arms if not arm.sends_nothing] or arms
    dense = [arm for arm in sending if arm.name == "dense"]
    return next((arm for arm in arms if arm.name == planned), [*dense, *sending][0])


def _summarize(arm: ArmRun, last: int) -> ArmSummary:
    def curve(name: str) -> Curve | None:
        return _curve(seed.series(name) for seed in arm.seeds)

    def mean(measure: Callable[[Line], float | None]) -> float | None:
        of_seeds = [
            [value for line in seed.rounds.values() if (value := measure(line)) is not None] for seed in arm.seeds
        ]
        return fmean(map(fmean, present)) if (present := list(filter(None, of_seeds))) else None

    accuracies = [seed.series("accuracy") for seed in arm.seeds]
    ranks = [found for seed in arm.seeds if (found := _last_ranks(seed))]
    shared = [name for name in (ranks[0] if ranks else {}) if all(name in found for found in ranks)]
    clients = [number_of(of, "accuracy") for seed in arm.seeds for of in seed.clients.values()]
    return ArmSummary(
        name=arm.name,
        about=arm.about,
        accuracy=_curve(accuracies),
        total_bytes=_curve(_cumulative(seed) for seed in arm.seeds),
        gap=curve("gap"),
        factor_norm=curve("factor_norm"),
        weight_norm=curve("weight_norm"),
        last_round=last,
        final=tuple(series[last] for series in accuracies if last in series),
        rounds=tuple(max(seed.rounds, default=0) for seed in arm.seeds),
        unfinished={seed.seed: why for seed in arm.seeds if (why := _why_unfinished(seed, last))},
        round_bytes=mean(_round_bytes),
        participant_bytes=mean(_participant_bytes),
        train_seconds=mean(lambda line: number_of(line, "train_seconds")),
        clients=np.array([accuracy for accuracy in clients if accuracy is not None], np.float64),
        ranks={name: fmean(found[name] for found in ranks) for name in shared},
        full_ranks=_full_ranks(arm.about),
    )


def _why_unfinished(seed: SeedRun, last: int) -> str:
    """Why a seed did not come to its end, or has no accuracy after round `last`; empty if neither."""
    number = max(seed.rounds, default=0)
    when = f"after round {number}" if number else "in round 1"
    if seed.done is not None and (reason := seed.done.get("diverged")):
        return f"diverged {when}: {reason}"
    line = seed.rounds.get(last, {})
    lost = "loss" in line and number_of(line, "loss") is None
    reasons = [f"stopped {when}"] if seed.done is None else []
    return "; ".join([*reasons, *([f"the loss after round {last} is not finite"] if lost else [])])


def _curve(series: Iterable[Mapping[int, float]]) -> Curve | None:
    """The curve of those seeds that have the measure; None if none has."""
    present = [values for values in series if values]
    rounds = sorted(set.intersection(*(set(values) for values in present))) if present else []
    if not rounds:
        return None
    values = np.array([[of[number] for number in rounds] for of in present])
    sd = values.std(axis=0, ddof=1) if len(present) > 1 else np.zeros(len(rounds))
    return Curve(np.array(rounds, np.float64), values.mean(axis=0), sd, len(present))


def _cumulative(seed: SeedRun) -> dict[int, float]:
    """Bytes from the first round to each; up to where a round or its bytes are missing."""
    sums: dict[int, float] = {}
    total, number = 0.0, 1
    while (line := seed.rounds.get(number)) is not None and (sent := _round_bytes(line)) is not None:
        sums[number] = total = total + sent
        number += 1
    return sums


def _round_bytes(line: Line) -> float | None:
    up, down = number_of(line, "up_bytes"), number_of(line, "down_bytes")
    return None if up is None or down is None else up + down


def _participant_bytes(line: Line) -> float | None:
    sent, participants = _round_bytes(line), number_of(line, "participants")
    return sent / participants if sent is not None and participants else None


def _last_ranks(seed: SeedRun) -> dict[str, float]:
    for _, line in sorted(seed.rounds.items(), reverse=True):
        ranks = line.get("ranks")
        if isinstance(ranks, dict) and ranks:
            return {name: rank for name in ranks if (rank := number_of(ranks, name)) is not None}
    return {}


def _full_ranks(about: Line) -> dict[str, int]:
    found = about.get("full_ranks")
    ranks = found if isinstance(found, dict) else {}
    return {name: int(rank) for name in ranks if (rank := number_of(ranks, name)) is not None}
