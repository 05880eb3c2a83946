"""Figures with a line per arm: accuracy, gap and norms by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedpara_edge.report.curve import Curve
from fedpara_edge.report.palette import look
from fedpara_edge.report.plots.labels import CHARACTER_INCHES, colour_of, key_of, label_ends, legend, show_percent
from fedpara_edge.report.plots.style import WIDTH, draw_band, panels_of
from fedpara_edge.report.summary import ArmSummary, Summary

MOST_DIRECT_LABELS, LONGEST_DIRECT_LABEL = 7, 18
MARKERS_OF_A_LINE = 25


def accuracy_by_round(summary: Summary) -> Figure | None:
    """Accuracy by round, with a band of one standard deviation."""
    return _by_round(summary, lambda arm: arm.accuracy, "accuracy", highest=1.0)


def gap_by_round(summary: Summary) -> Figure | None:
    """Aggregation gap by round, from 0."""
    return _by_round(summary, lambda arm: arm.gap, "aggregation gap", from_zero=True)


def norms_by_round(summary: Summary) -> Figure | None:
    """Norms of all factors, and of all trained weights, composed where they are factored."""
    measures: dict[str, Callable[[ArmSummary], Curve | None]] = {
        "norm of all factors": lambda arm: arm.factor_norm,
        "norm of all weights, composed": lambda arm: arm.weight_norm,
    }
    shown = {name: curves for name, of in measures.items() if (curves := summary.curves(of))}
    if not shown:
        return None
    figure, panels = panels_of(3.3, len(shown))
    for axes, (name, curves) in zip(panels, shown.items(), strict=True):
        _draw(axes, summary, curves, ticks=6)
        axes.set_title(name)
    arms = {arm.name for curves in shown.values() for arm, _ in curves}
    legend(figure, [key_of(summary, arm) for arm in summary.arms if arm.name in arms])
    return figure


def _by_round(
    summary: Summary,
    of: Callable[[ArmSummary], Curve | None],
    label: str,
    *,
    from_zero: bool = False,
    highest: float = np.inf,
) -> Figure | None:
    curves = summary.curves(of)
    if not curves:
        return None
    longest = max(len(arm.name) for arm, _ in curves)
    is_level = len({float(curve.rounds[-1]) for _, curve in curves}) == 1
    is_direct = is_level and len(curves) <= MOST_DIRECT_LABELS and longest <= LONGEST_DIRECT_LABEL
    figure, (axes,) = panels_of(3.5, right=(0.3 + CHARACTER_INCHES * longest) / WIDTH if is_direct else 0.0)
    _draw(axes, summary, curves, ticks=8, highest=highest)
    if from_zero:
        axes.set_ylim(0, 1.08 * max(float((curve.mean + curve.sd).max()) for _, curve in curves) or 1.0)
    show_percent(axes.yaxis)
    axes.set_ylabel(label)
    if is_direct:
        ends = [(curve.rounds[-1], curve.mean[-1], arm.name, colour_of(summary, arm)) for arm, curve in curves]
        label_ends(axes, ends)
    else:
        legend(figure, [key_of(summary, arm) for arm, _ in curves])
    return figure


def _draw(
    axes: Axes, summary: Summary, curves: Sequence[tuple[ArmSummary, Curve]], *, ticks: int, highest: float = np.inf
) -> None:
    """Draw a measure from 0 to `highest`, with bands of one standard deviation where there are several seeds."""
    for arm, curve in curves:
        style = look(summary, arm)
        axes.plot(curve.rounds, curve.mean, **style, markevery=-(-len(curve.rounds) // MARKERS_OF_A_LINE), zorder=3)
        draw_band(axes, curve.rounds, curve, colour=style["color"], highest=highest)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
