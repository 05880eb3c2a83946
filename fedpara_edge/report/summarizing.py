"""From the measurements of every seed to what the report compares.

    curve            mean and standard deviation over the seeds, at the rounds that all seeds of the arm have reached
    smooth curve     mean of each point and its two neighbours; the first and the last point as they are
    rounds to a      first round at which the smooth curve of the accuracy is at least the target, interpolated linearly
    target           between two evaluated rounds; never less than the first evaluated round
    bytes to it      sent up and down by all participants until then, mean over the seeds; linear within a round
    ratio            bytes of the reference over bytes of this arm

The target is the plan's. Without one, targets are 0.5 and 1 points below the highest point of the reference's smooth
curve, so that the reference reaches them. The final accuracy of an arm is that after the last round that was evaluated
in the whole run, of the seeds that reached it with a finite loss: arms are only compared after the same round, except
for those to which the plan gives fewer or more rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from fedpara_edge.errors import InputError, counted
from fedpara_edge.report.curve import Curve, curve_of
from fedpara_edge.report.results import ArmRun, Line, Results, SeedRun, Unplanned, number_of, numbers_of, round_bytes
from fedpara_edge.report.summary import ArmSummary, Summary
from fedpara_edge.simulation.plan.plan import Plan

BELOW_BEST = (0.005, 0.01)


def summarize(results: Results) -> Summary:
    """Summarize the measurements of a run."""
    plan = results.plan
    planned = {arm.name: arm.rounds for arm in plan.arms}
    ends = {arm.name: planned.get(arm.name, plan.rounds) for arm in results.arms}
    come_to = ((number, ends[arm.name]) for arm in results.arms for seed in arm.seeds for number in seed.rounds)
    last = max((number for number, end in come_to if plan.is_evaluated(number, last=end)), default=0)
    arms = tuple(_summarize(arm, _last_evaluated(plan, last, ends[arm.name]), ends[arm.name]) for arm in results.arms)
    reference = _reference(arms, plan.reference)
    curve = reference.accuracy
    if plan.target is not None:
        targets: tuple[float, ...] = (plan.target,)
    else:
        targets = () if curve is None else tuple(sorted(curve.best - below for below in BELOW_BEST))
    return Summary(
        arms=arms,
        reference=reference.name,
        targets=targets,
        is_planned=plan.target is not None,
        notes=tuple(_notes(results, arms, reference)),
    )


def select(summary: Summary, arms: Mapping[str, str]) -> Summary:
    """Select some arms and rename them.

    Args:
        summary: Summary of all arms, whose targets are kept.
        arms: New name of each arm to keep, by its name in the plan. If the reference is not among them, another one is
            chosen as if the plan named none.

    Raises:
        InputError: There is no such arm, none is kept, or two get the same name.
    """
    there = {arm.name: arm for arm in summary.arms}
    for name in arms:
        if name not in there:
            raise InputError(f"expected one of the run's arms, {', '.join(there)}, found {name!r}", key="arm")
    if not arms or len(set(arms.values())) < len(arms):
        raise InputError(
            f"expected arms with names of their own, found {', '.join(arms.values()) or 'none'}", key="arm"
        )
    kept = tuple(there[name] for name in arms)
    reference = summary.reference if summary.reference in arms else _reference(kept, None).name
    renamed = tuple(replace(arm, name=arms[arm.name]) for arm in kept)
    return replace(summary, arms=renamed, reference=arms[reference])


def _notes(results: Results, arms: Sequence[ArmSummary], reference: ArmSummary) -> Iterator[str]:
    """Notes for the reader: whether the reference is the plan's, and what is missing or unfinished."""
    plan = results.plan
    if plan.reference not in (None, reference.name):
        yield f"{plan.reference}, the plan's reference, has not begun: compared with {reference.name} instead"
    elif reference.accuracy is None:
        yield f"{reference.name}, the reference, has no accuracy: nothing can be compared with it"
    begun = {arm.name: {seed.seed for seed in arm.seeds} for arm in results.arms}
    missing = [arm.name for arm in plan.arms if arm.name not in begun]
    if missing:
        yield f"arms of the plan that have not begun, {len(missing)} of {len(plan.arms)}: {', '.join(missing)}"
    for arm in arms:
        reasons = {**dict.fromkeys(set(plan.seeds) - begun[arm.name], "not begun"), **arm.unfinished}
        yield from (f"{arm.name}, seed {seed}: {why}" for seed, why in sorted(reasons.items()))


def _last_evaluated(plan: Plan | Unplanned, last: int, end: int) -> int:
    """Last round up to `last` after which an arm of `end` rounds is evaluated; 0 if there is none."""
    rounds = range(min(last, end), 0, -1)
    return next((number for number in rounds if plan.is_evaluated(number, last=end)), 0)


def _reference(arms: Sequence[ArmSummary], planned: str | None) -> ArmSummary:
    """The arm of that name, or else the one called dense or the first, among those that send anything."""
    sending = [arm for arm in arms if not arm.sends_nothing] or arms
    dense = [arm for arm in sending if arm.name == "dense"]
    return next((arm for arm in arms if arm.name == planned), [*dense, *sending][0])


def _summarize(arm: ArmRun, last: int, end: int) -> ArmSummary:
    def curve(name: str) -> Curve | None:
        return curve_of(seed.series(name) for seed in arm.seeds)

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
        accuracy=curve_of(accuracies),
        total_bytes=curve_of(seed.total_bytes() for seed in arm.seeds),
        gap=curve("gap"),
        factor_norm=curve("factor_norm"),
        weight_norm=curve("weight_norm"),
        last_round=last,
        final=tuple(series[last] for series in accuracies if last in series),
        rounds=tuple(max(seed.rounds, default=0) for seed in arm.seeds),
        unfinished={seed.seed: why for seed in arm.seeds if (why := _why_unfinished(seed, last, end))},
        round_bytes=mean(round_bytes),
        participant_bytes=mean(_participant_bytes),
        train_seconds=mean(lambda line: number_of(line, "train_seconds")),
        clients=np.array([accuracy for accuracy in clients if accuracy is not None], np.float64),
        ranks={name: fmean(found[name] for found in ranks) for name in shared},
        full_ranks={name: int(rank) for name, rank in numbers_of(arm.about, "full_ranks").items()},
    )


def _why_unfinished(seed: SeedRun, last: int, end: int) -> str:
    """Why a seed has not reached round `end`, or has no accuracy after round `last`; empty if neither."""
    number = max(seed.rounds, default=0)
    if seed.done is not None and (reason := seed.done.get("diverged")):
        return f"diverged {f'after round {number}' if number else 'in round 1'}: {reason}"
    reasons = [f"{number} of {counted(end, 'round')} done"] if number < end else []
    line = seed.rounds.get(last, {})
    if "loss" in line and number_of(line, "loss") is None:
        reasons.append(f"the loss after round {last} is not finite")
    return "; ".join(reasons)


def _participant_bytes(line: Line) -> float | None:
    sent, participants = round_bytes(line), number_of(line, "participants")
    return sent / participants if sent is not None and participants else None


def _last_ranks(seed: SeedRun) -> dict[str, float]:
    by_round = (numbers_of(line, "ranks") for _, line in sorted(seed.rounds.items(), reverse=True))
    return next(filter(None, by_round), {})
