"""Figure of accuracy over bytes: what each arm has to send for its accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fedpara_edge.report.curve import Curve, Numbers
from fedpara_edge.report.palette import INK, MUTED, PAPER, look
from fedpara_edge.report.plots.labels import (
    Labelled,
    colour_of,
    key_of,
    label_curves,
    legend,
    short,
    show_percent,
    size_tick,
)
from fedpara_edge.report.plots.style import draw_band, panels_of
from fedpara_edge.report.summary import ArmSummary, Summary
from fedpara_edge.report.units import percent, ratio, size

MOST_DIRECT_LABELS = 5
SILENT = (0, (1, 1.5))
"""Line style of arms that send nothing."""


def accuracy_by_bytes(summary: Summary) -> Figure | None:
    """Accuracy over the bytes sent until then, on a logarithmic axis; arms that send nothing are level lines.

    Points are means over the seeds, with a band of one standard deviation. Lines are smooth curves, so that a line
    crosses a target where its arm reaches it. With a single target, an arrow shows how many times fewer bytes the most
    frugal arm needs for it than the reference.
    """
    sending = [
        (arm, points) for arm in summary.arms if not arm.sends_nothing and (points := _over_bytes(arm)) is not None
    ]
    silent = summary.curves(lambda arm: arm.accuracy if arm.sends_nothing else None)
    if not sending:
        return None
    figure, (axes,) = panels_of(3.7)
    for arm, (sent, curve) in sending:
        _draw(axes, summary, arm, sent, curve)
    for arm, curve in silent:
        axes.axhline(curve.mean[-1], color=colour_of(summary, arm), linestyle=SILENT, linewidth=1.5)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 2000 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(size_tick))
    axes.xaxis.set_minor_locator(NullLocator())
    show_percent(axes.yaxis)
    axes.set_xlabel("sent by all participants, up and down")
    axes.set_ylabel("accuracy")
    _mark_targets(axes, summary)
    named = [Labelled(sent, curve.smooth, short(arm.name), colour_of(summary, arm)) for arm, (sent, curve) in sending]
    if silent or len(named) > MOST_DIRECT_LABELS or not label_curves(axes, named):
        keys = [
            Line2D([], [], color=colour_of(summary, arm), linestyle=SILENT, label=f"{short(arm.name)}, sends nothing")
            for arm, _ in silent
        ]
        legend(figure, [*(key_of(summary, arm) for arm, _ in sending), *keys])
    return figure


def _over_bytes(arm: ArmSummary) -> tuple[Numbers, Curve] | None:
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


def _draw(axes: Axes, summary: Summary, arm: ArmSummary, sent: Numbers, curve: Curve) -> None:
    style = look(summary, arm)
    axes.plot(sent, curve.smooth, color=style["color"], linestyle=style["linestyle"], zorder=3)
    axes.plot(sent, curve.mean, **style | {"linestyle": "none"}, markersize=3.2, zorder=3)
    draw_band(axes, sent, curve, colour=style["color"], highest=1.0)


def _mark_targets(axes: Axes, summary: Summary) -> None:
    if not summary.targets:
        return
    for target in summary.targets:
        axes.axhline(target, color=MUTED, linewidth=0.8, linestyle=(0, (5, 4)), zorder=1)
    word = "target" if len(summary.targets) == 1 else "targets"
    text = "\n".join([word, *map(percent, reversed(summary.targets))])
    place = (1, float(np.mean(summary.targets)))
    beside: Any = {"textcoords": "offset points", "va": "center", "color": MUTED, "fontsize": 8}
    axes.annotate(text, place, (5, 0), axes.get_yaxis_transform(), **beside)
    if len(summary.targets) == 1:
        _mark_saving(axes, summary, summary.targets[0])


def _mark_saving(axes: Axes, summary: Summary, target: float) -> None:
    """Ring the places where arms reach the target, and draw an arrow from the reference to the most frugal of them."""
    needed = {arm.name: found.bytes for arm in summary.arms if (found := summary.reached(arm, target)) and found.bytes}
    for arm in summary.arms:
        if arm.name in needed:
            ring: Any = {"color": PAPER, "markeredgecolor": colour_of(summary, arm), "markersize": 6.5, "zorder": 4}
            axes.plot(needed[arm.name], target, "o", **ring)
    least, most = min(needed.values(), default=0.0), needed.get(summary.reference, 0.0)
    if not least < most:
        return
    bottom, top = axes.get_ylim()
    level = top + 0.04 * (top - bottom)
    axes.set_ylim(bottom, top + 0.16 * (top - bottom))
    for sent in (least, most):
        axes.plot([sent, sent], [target, level], color=MUTED, linewidth=0.8, zorder=1)
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (least, level), (most, level), arrowprops=arrow)
    text: Any = {"textcoords": "offset points", "va": "bottom"}
    axes.annotate(size(least), (least, level), (-4, 0), **text | {"va": "center", "ha": "right"})
    axes.annotate(size(most), (most, level), (4, 0), **text | {"va": "center", "ha": "left"})
    loud = {"ha": "center", "fontsize": 11, "fontweight": "bold"}
    axes.annotate(f"{ratio(most / least)} fewer bytes", (np.sqrt(least * most), level), (0, 3), **text | loud)
