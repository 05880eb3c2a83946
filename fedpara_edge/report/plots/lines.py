"""Figures with a line for each arm: accuracy, gap and norms by round, accuracy over bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from fedpara_edge.report.curve import Curve
from fedpara_edge.report.palette import MUTED, look
from fedpara_edge.report.plots.labels import CHARACTER_INCHES, colour_of, key_of, label_ends, legend, short, size_tick
from fedpara_edge.report.plots.style import WIDTH, panels_of
from fedpara_edge.report.summary import ArmSummary, Summary
from fedpara_edge.report.units import percent

MOST_DIRECT_LABELS, LONGEST_DIRECT_LABEL = 7, 18
MARKERS_OF_A_LINE = 25


def accuracy_by_round(summary: Summary) -> Figure | None:
    """Mean over the seeds, with a band of one standard deviation."""
    return _by_round(summary, lambda arm: arm.accuracy, "accuracy")


def gap_by_round(summary: Summary) -> Figure | None:
    """Aggregation gap, from 0."""
    return _by_round(summary, lambda arm: arm.gap, "aggregation gap", from_zero=True)


def accuracy_by_bytes(summary: Summary) -> Figure | None:
    """Against all that was sent until then, on a logarithmic axis; arms that send nothing are level lines."""
    sending = [
        (arm, points)
        for arm in summary.arms
        if not arm.sends_nothing and (points := _accuracy_and_bytes(arm)) is not None
    ]
    silent = [(arm, arm.accuracy) for arm in summary.arms if arm.sends_nothing and arm.accuracy is not None]
    if not sending:
        return None
    figure, (axes,) = panels_of(3.7)
    for arm, (sent, curve) in sending:
        _line(axes, summary, arm, sent, curve)
    for arm, curve in silent:
        axes.axhline(curve.mean[-1], color=colour_of(summary, arm), linestyle=(0, (1, 1.5)), linewidth=1.5)
    for target in summary.targets:
        axes.axhline(target, color=MUTED, linewidth=0.8, linestyle=(0, (5, 4)), zorder=1)
    if summary.targets:
        word = "target" if len(summary.targets) == 1 else "targets"
        text, place = f"{word} {', '.join(map(percent, summary.targets))}", (0, max(summary.targets))
        axes.annotate(text, place, (4, 2), axes.get_yaxis_transform(), "offset points", color=MUTED, fontsize=7.5)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 2000 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(size_tick))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlabel("sent by all participants, up and down")
    axes.set_ylabel("accuracy")
    silent_keys = [
        Line2D(
            [], [], color=colour_of(summary, arm), linestyle=(0, (1, 1.5)), label=f"{short(arm.name)}, sends nothing"
        )
        for arm, _ in silent
    ]
    legend(figure, [*(key_of(summary, arm) for arm, _ in sending), *silent_keys])
    return figure


def norms_by_round(summary: Summary) -> Figure | None:
    """Norm of all factors, and of all that is trained, composed where it is factored."""
    measures: dict[str, Callable[[ArmSummary], Curve | None]] = {
        "norm of all factors": lambda arm: arm.factor_norm,
        "norm of all weights, composed": lambda arm: arm.weight_norm,
    }
    shown = {name: of for name, of in measures.items() if any(of(arm) for arm in summary.arms)}
    if not shown:
        return None
    figure, panels = panels_of(3.3, len(shown))
    for axes, (name, of) in zip(panels, shown.items(), strict=True):
        for arm in summary.arms:
            curve = of(arm)
            if curve is not None:
                _line(axes, summary, arm, curve.rounds, curve)
        axes.set_title(name)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend(figure, [key_of(summary, arm) for arm in summary.arms if any(of(arm) for of in shown.values())])
    return figure


def _by_round(
    summary: Summary,
    of: Callable[[ArmSummary], Curve | None],
    label: str,
    *,
    from_zero: bool = False,
) -> Figure | None:
    curves = [(arm, curve) for arm in summary.arms if (curve := of(arm)) is not None]
    if not curves:
        return None
    longest = max(len(arm.name) for arm, _ in curves)
    is_level = len({float(curve.rounds[-1]) for _, curve in curves}) == 1
    is_direct = is_level and len(curves) <= MOST_DIRECT_LABELS and longest <= LONGEST_DIRECT_LABEL
    figure, (axes,) = panels_of(3.5, right=(0.3 + CHARACTER_INCHES * longest) / WIDTH if is_direct else 0.0)
    for arm, curve in curves:
        _line(axes, summary, arm, curve.rounds, curve)
    if from_zero:
        axes.set_ylim(0, 1.08 * max(float((curve.mean + curve.sd).max()) for _, curve in curves) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    if is_direct:
        ends = [(curve.rounds[-1], curve.mean[-1], arm.name, colour_of(summary, arm)) for arm, curve in curves]
        label_ends(axes, ends)
    else:
        legend(figure, [key_of(summary, arm) for arm, _ in curves])
    return figure


def _accuracy_and_bytes(arm: ArmSummary) -> tuple[np.ndarray, Curve] | None:
    """Bytes until each evaluated round, and the accuracy there; None without both."""
    if arm.accuracy is None:
        return None
    curve = arm.accuracy
    sent = [arm.bytes_until(number) for number in curve.rounds]
    known = [place for place, count in enumerate(sent) if count]
    if not known:
        return None
    kept = Curve(curve.rounds[known], curve.mean[known], curve.sd[known], curve.seeds)
    return np.array([sent[place] for place in known], np.float64), kept


def _line(axes: Axes, summary: Summary, arm: ArmSummary, x: np.ndarray, curve: Curve) -> None:
    style = look(summary, arm)
    axes.plot(x, curve.mean, **style, markevery=-(-len(x) // MARKERS_OF_A_LINE), zorder=3)
    if curve.seeds > 1:
        band = {"color": style["color"], "alpha": 0.16, "linewidth": 0}
        axes.fill_between(x, curve.mean - curve.sd, curve.mean + curve.sd, **band, zorder=2)
