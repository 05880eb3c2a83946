"""Tables of the report, one row per arm.

A table is None where the run has measured nothing of it; a cell that was not measured is a dash.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev

import numpy as np

from fedpara_edge.report.curve import Curve
from fedpara_edge.report.page import Table
from fedpara_edge.report.results import number_of
from fedpara_edge.report.summary import RATES_MBPS, ArmSummary, Summary
from fedpara_edge.report.units import digits, percent, ratio, seconds, size

NONE = "–"
ROUNDS_SHOWN, ROUNDS_WITH_SPREAD = 8, 6


def arms_table(summary: Summary) -> Table:
    """What each arm is, how much it sends and the accuracy it ends with."""
    reference = summary.arm(summary.reference)
    has_personal = any(arm.about.get("personal_parameters") for arm in summary.arms)
    rows = []
    for arm in summary.arms:
        shared, dense = number_of(arm.about, "shared_parameters"), number_of(arm.about, "dense_parameters")
        kept = {"kept on the device": _count(number_of(arm.about, "personal_parameters"))} if has_personal else {}
        sent = 0.0 if arm.sends_nothing else shared
        difference = None
        if arm.final and arm.is_complete and reference.is_complete and arm is not reference:
            difference = 100 * (fmean(arm.final) - fmean(reference.final))
        rows.append(
            {
                "arm": arm.name,
                "model": _model(arm),
                "parameters sent": _count(sent),
                **kept,
                "of dense": NONE if sent is None or not dense else percent(sent / dense),
                "sent a round": _bytes(arm.round_bytes),
                "rounds × seeds": _rounds(arm),
                "accuracy": f"{accuracy(arm.final)}{'' if arm.accuracy is None else _seeds(len(arm.final), arm)}",
                "points": NONE if difference is None else _signed(difference),
            }
        )
    ends = sorted({arm.last_round for arm in summary.arms})
    when = f"after round {ends[0]}" if len(ends) == 1 else "after the last round of the arm"
    caption = (
        f"Sent a round: all participants together, up and down, mean over the rounds. Accuracy: {when}, of the seeds "
        f"that got there. Points: difference in accuracy from {summary.reference}, where all seeds got there."
        + ("" if len(ends) == 1 else " Arms have different numbers of rounds.")
    )
    return Table.of(rows, caption, summary.reference, text=(1,))


def accuracy_table(summary: Summary) -> Table | None:
    """Accuracy after some of the evaluated rounds, and the best of the smooth curve, by which targets are reached."""
    curves = summary.curves(lambda arm: arm.accuracy)
    rounds = sorted({int(number) for _, curve in curves for number in curve.rounds})
    if not rounds:
        return None
    has_spread = any(curve.seeds > 1 for _, curve in curves)
    places = np.linspace(0, len(rounds) - 1, ROUNDS_WITH_SPREAD if has_spread else ROUNDS_SHOWN).round().astype(int)
    chosen = sorted({rounds[place] for place in places} | {int(curve.rounds[-1]) for _, curve in curves})
    rows = []
    for arm, curve in curves:
        points = zip(curve.rounds.astype(int).tolist(), curve.mean.tolist(), curve.sd.tolist(), strict=True)
        cells = {number: _mean(mean, sd if curve.seeds > 1 else None) for number, mean, sd in points}
        rows.append([arm.name, *(cells.get(number, NONE) for number in chosen), _mean(curve.best)])
    header = ["after round", *map(str, chosen), "best, smoothed"]
    spread = ", ± their standard deviation" if has_spread else ""
    caption = (
        f"Accuracy in %, mean over the seeds{spread}. Best, smoothed: highest mean of an evaluated round and its "
        "two neighbours (first and last round as they are); targets below are reached by this curve."
    )
    return Table(header, rows, caption, summary.reference)


def bytes_tables(summary: Summary) -> list[Table]:
    """For each target, the rounds and bytes that every arm needed, and the ratio of the bytes to the reference's."""
    return [_bytes_table(summary, target) for target in summary.targets]


def _bytes_table(summary: Summary, target: float) -> Table:
    header = [f"to {percent(target)}", "rounds", "bytes", f"bytes of {summary.reference} over these"]
    rows = []
    for arm in summary.arms:
        cells = [_shortfall(arm, target), NONE, NONE]
        if (found := summary.reached(arm, target)) is not None:
            rounds = f"{found.round:.1f}{_seeds(found.seeds, arm)}"
            cells = [rounds, _bytes(found.bytes), NONE if found.ratio is None else ratio(found.ratio)]
        rows.append([arm.name, *cells])
    return Table(header, rows, reference=summary.reference)


def time_table(summary: Summary) -> Table | None:
    """Seconds per round of one participant, as in the paper's Tables 7 and 8."""
    if all(arm.train_seconds is None for arm in summary.arms):
        return None
    rows = []
    reference = summary.arm(summary.reference)
    for arm in summary.arms:
        cells = {"seconds a round": arm.name, "computing": _seconds(arm.train_seconds)}
        for rate in RATES_MBPS:
            total, of_reference = arm.round_seconds(rate), reference.round_seconds(rate)
            faster = f" ({ratio(of_reference / total)})" if total and of_reference and arm is not reference else ""
            cells[f"{rate} Mbit/s sending"] = _seconds(arm.sending_seconds(rate))
            cells[f"{rate} Mbit/s total"] = f"{_seconds(total)}{faster}"
        rows.append(cells)
    caption = "In parentheses: how many times faster than the reference."
    return Table.of(rows, caption, summary.reference)


def clients_table(summary: Summary) -> Table | None:
    """How accuracy spreads over the clients, all weighted equally."""
    arms = [arm for arm in summary.arms if len(arm.clients)]
    if not arms:
        return None
    rows = []
    for arm in arms:
        low, middle, high = np.quantile(arm.clients, (0.1, 0.5, 0.9)).tolist()
        values = (low, middle, high, float(arm.clients.mean()), float(arm.clients.std()))
        rows.append([arm.name, str(len(arm.clients)), *map(percent, values)])
    header = ["arm", "clients", "worst tenth below", "median", "best tenth above", "mean", "sd"]
    caption = "Each client on its own test examples, when last measured; clients of all seeds, weighted equally."
    return Table(header, rows, caption, summary.reference)


def ranks_table(summary: Summary) -> Table | None:
    """Rank of every composed weight, by layer."""
    arms = [arm for arm in summary.arms if arm.ranks]
    layers = list(dict.fromkeys(name for arm in arms for name in arm.ranks))
    if not layers:
        return None
    full = {name: rank for arm in arms for name, rank in arm.full_ranks.items()}
    rows = [
        [
            name,
            *([str(full.get(name, NONE))] if full else []),
            *(f"{arm.ranks[name]:.4g}" if name in arm.ranks else NONE for arm in arms),
        ]
        for name in layers
    ]
    return Table(["layer", *(["full rank"] if full else []), *(arm.name for arm in arms)], rows)


def gap_table(summary: Summary) -> Table | None:
    """Aggregation gap: mean, largest and last."""
    curves = summary.curves(lambda arm: arm.gap)
    if not curves:
        return None
    rows = [
        [arm.name, *(percent(float(value), 2) for value in (curve.mean.mean(), curve.mean.max(), curve.mean[-1]))]
        for arm, curve in curves
    ]
    return Table(["arm", "mean over rounds", "largest", "last round"], rows, reference=summary.reference)


def norms_table(summary: Summary) -> Table | None:
    """Norms after the first and the last round."""
    measures: tuple[Callable[[ArmSummary], Curve | None], ...] = (lambda a: a.factor_norm, lambda a: a.weight_norm)
    arms = [arm for arm in summary.arms if any(of(arm) is not None for of in measures)]
    if not arms:
        return None
    rows = [[arm.name, *(cell for of in measures for cell in _ends(of(arm)))] for arm in arms]
    header = ["arm", "factors, first round", "last round", "composed weights, first round", "last round"]
    return Table(header, rows, reference=summary.reference)


def accuracy(seeds: tuple[float, ...]) -> str:
    """Mean and standard deviation over the seeds, in percent.

    >>> accuracy((0.82, 0.83)), accuracy((0.82,)), accuracy(())
    ('82.5 ± 0.7 %', '82.0 %', '–')
    """
    if not seeds:
        return NONE
    spread = f" ± {100 * stdev(seeds):.1f}" if len(seeds) > 1 else ""
    return f"{100 * fmean(seeds):.1f}{spread} %"


def _mean(share: float, sd: float | None = None) -> str:
    return f"{100 * share:.1f}" if sd is None else f"{100 * share:.1f} ± {100 * sd:.1f}"


def _shortfall(arm: ArmSummary, target: float) -> str:
    """By how much an arm misses a target, with as many digits as it takes to show a difference."""
    if arm.accuracy is None:
        return "not measured"
    points = 100 * (target - arm.accuracy.best)
    short = f"{points:.1f}" if points >= 0.095 else f"{points:.2f}" if points >= 0.005 else "less than 0.01"
    return f"not reached, {short} points short"


def _model(arm: ArmSummary) -> str:
    about = arm.about
    kind, gamma = about.get("kind"), number_of(about, "gamma")
    parts = [str(about.get("model", NONE))]
    if kind:
        parts.append(f"{kind} γ\u00a0{gamma:g}" if gamma is not None and kind != "dense" else str(kind))
    if about.get("local_only"):
        parts.append("every client alone")
    elif about.get("algorithm", "fedavg") != "fedavg":
        parts.append(str(about["algorithm"]))
    codecs = [
        f"{about[name]} {way}"
        for name, way in (("codec", "up"), ("downlink_codec", "down"))
        if about.get(name, "float32") != "float32" and not about.get("local_only")
    ]
    return ", ".join([*parts, *codecs])


def _rounds(arm: ArmSummary) -> str:
    low, high = min(arm.rounds), max(arm.rounds)
    seeds = f" × {len(arm.rounds)}"
    return f"{high}{seeds}" if low == high else f"{low} to {high}{seeds}"


def _seeds(count: int, arm: ArmSummary) -> str:
    """Remark that only some of an arm's seeds count; empty if all do."""
    return "" if count == len(arm.rounds) else f" ({count} of {len(arm.rounds)} seeds)"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−") if abs(points) >= 0.05 else "0.0"


def _ends(curve: Curve | None) -> tuple[str, str]:
    return (NONE, NONE) if curve is None else (digits(float(curve.mean[0])), digits(float(curve.mean[-1])))


def _count(number: float | None) -> str:
    return NONE if number is None else f"{number:,.0f}"


def _bytes(count: float | None) -> str:
    return NONE if count is None else size(count) if count else "nothing"


def _seconds(count: float | None) -> str:
    return NONE if count is None else seconds(count) if count else "0 s"
