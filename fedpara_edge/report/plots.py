"""The figures of the report. Imports matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from fedpara_edge.report.palette import FAINT, INK, MUTED, PAPER, look
from fedpara_edge.report.summary import RATES_MBPS, ArmSummary, Curve, Summary
from fedpara_edge.report.svg import embed
from fedpara_edge.report.units import percent, ratio, seconds, size

WIDTH = 7.2
PNG_DPI = 160
LABEL_CHARACTERS = 30
CHARACTER_INCHES = 0.067
"""Of labels, on average."""
MOST_DIRECT_LABELS, LONGEST_DIRECT_LABEL = 7, 18
MARKERS_OF_A_LINE = 25
BAR = 0.62
"""Height of bars that are 1 apart."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "svg.fonttype": "path",
    "svg.hashsalt": "fedpara-edge",
}


def draw(summary: Summary) -> dict[str, Figure]:
    """The figures for which something was measured, by name."""
    drawers: dict[str, Callable[[Summary], Figure | None]] = {
        "accuracy-by-round": accuracy_by_round,
        "accuracy-by-bytes": accuracy_by_bytes,
        "bytes-to-target": bytes_to_target,
        "seconds-per-round": seconds_per_round,
        "clients": accuracy_of_clients,
        "ranks": ranks_of_layers,
        "gap": gap_by_round,
        "norms": norms_by_round,
    }
    with mpl.rc_context(STYLE):
        found = {name: drawer(summary) for name, drawer in drawers.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def to_png(figure: Figure) -> bytes:
    """The figure on white."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=PNG_DPI, facecolor=PAPER, metadata={"Software": None})
    return file.getvalue()


def to_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an element of an HTML page: transparent, as wide as its place, coloured by its style.

    Args:
        figure: to write.
        name: that no other figure of the page has; its identifiers start with it.
        title: what a screen reader says.
    """
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", facecolor="none", metadata={"Date": None})
    return embed(file.getvalue(), name, title)


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
    figure, (axes,) = _figure(3.7)
    for arm, (sent, curve) in sending:
        _line(axes, summary, arm, sent, curve)
    for arm, curve in silent:
        axes.axhline(curve.mean[-1], color=_colour(summary, arm), linestyle=(0, (1, 1.5)), linewidth=1.5)
    for target in summary.targets:
        axes.axhline(target, color=MUTED, linewidth=0.8, linestyle=(0, (5, 4)), zorder=1)
    if summary.targets:
        word = "target" if len(summary.targets) == 1 else "targets"
        text, place = f"{word} {', '.join(map(percent, summary.targets))}", (0, max(summary.targets))
        axes.annotate(text, place, (4, 2), axes.get_yaxis_transform(), "offset points", color=MUTED, fontsize=7.5)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 2000 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(_size_tick))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlabel("sent by all participants, up and down")
    axes.set_ylabel("accuracy")
    silent_keys = [
        Line2D([], [], color=_colour(summary, arm), linestyle=(0, (1, 1.5)), label=f"{_short(arm.name)}, sends nothing")
        for arm, _ in silent
    ]
    _legend(figure, [*(_key(summary, arm) for arm, _ in sending), *silent_keys])
    return figure


def bytes_to_target(summary: Summary) -> Figure | None:
    """Bars with the bytes, and how many times fewer than the reference arm's."""
    arms = [arm for arm in summary.arms if arm.accuracy is not None]
    reached = {target: [summary.reached(arm, target) for arm in arms] for target in summary.targets}
    if not any(found is not None and found.bytes for row in reached.values() for found in row):
        return None
    figure, panels = _bars(arms, len(reached))
    for axes, (target, row) in zip(panels, reached.items(), strict=True):
        bars: list[tuple[float, str]] = []
        for place, (arm, found) in enumerate(zip(arms, row, strict=True)):
            sent = found.bytes if found is not None else None
            if found is None or sent is None:
                bars.append((0.0, "not reached" if found is None else "not measured"))
                continue
            text = size(sent) if sent else "nothing sent"
            if found.seeds < len(arm.rounds):
                text = f"{text}, {found.seeds} of {len(arm.rounds)} seeds"
            if found.ratio is not None and arm.name != summary.reference:
                more = f"{ratio(1 / found.ratio)} as much" if found.ratio < 1 else f"{ratio(found.ratio)} less"
                text = f"{text}, {more}"
            axes.barh(place, sent, color=_colour(summary, arm), height=BAR)
            bars.append((sent, text))
        _label_bars(axes, bars, arms, len(panels))
        axes.set_title(f"to {percent(target)} accuracy")
        axes.xaxis.set_major_formatter(FuncFormatter(_size_tick))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def seconds_per_round(summary: Summary) -> Figure | None:
    """Computing and sending of one participant, stacked, for each rate."""
    arms = [arm for arm in summary.arms if arm.round_seconds(RATES_MBPS[0]) is not None]
    if not arms:
        return None
    figure, panels = _bars(arms, len(RATES_MBPS), below=0.3)
    for axes, rate in zip(panels, RATES_MBPS, strict=True):
        totals = [arm.round_seconds(rate) or 0.0 for arm in arms]
        for place, (arm, total) in enumerate(zip(arms, totals, strict=True)):
            computing, colour = arm.train_seconds or 0.0, _colour(summary, arm)
            axes.barh(place, total, color=PAPER, height=BAR)  # so that no grid shines through
            axes.barh(place, total, color=colour, alpha=0.45, linewidth=0, height=BAR)
            axes.barh(place, computing, color=colour, height=BAR)
        _label_bars(axes, [(total, seconds(total)) for total in totals], arms, len(panels))
        axes.set_title(f"{rate} Mbit/s")
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.set_xlabel("seconds a round")
    keys = [
        Patch(color=MUTED, label="computing (measured)"),
        Patch(color=MUTED, alpha=0.45, label="sending (computed)"),
    ]
    _legend(figure, keys)
    return figure


def accuracy_of_clients(summary: Summary) -> Figure | None:
    """A point for each client, over a box of the middle half and the median."""
    arms = [arm for arm in summary.arms if len(arm.clients)]
    if not arms:
        return None
    figure, (axes,) = _bars(arms, 1, row=0.5)
    for place, arm in enumerate(arms):
        colour = _colour(summary, arm)
        low, middle, high = np.quantile(arm.clients, (0.25, 0.5, 0.75))
        axes.barh(place, high - low, left=low, height=0.6, color=colour, alpha=0.3)
        axes.plot([middle, middle], [place - 0.3, place + 0.3], color=colour, linewidth=2.4, solid_capstyle="butt")
        jitter = np.random.default_rng(0).uniform(-0.22, 0.22, len(arm.clients))
        axes.plot(arm.clients, place + jitter, ".", color=colour, markersize=4, alpha=0.65, markeredgewidth=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlabel("accuracy on a client's own test examples")
    return figure


def ranks_of_layers(summary: Summary) -> Figure | None:
    """Rank of each composed weight, over the largest that its shape allows."""
    arms = [arm for arm in summary.arms if arm.ranks]
    layers = list(dict.fromkeys(name for arm in arms for name in arm.ranks))
    if not layers:
        return None
    full = {name: rank for arm in arms for name, rank in arm.full_ranks.items()}
    figure, (axes,) = _figure(3.6)
    for place, name in enumerate(layers):
        if name in full:
            axes.bar(place, full[name], width=0.8, color=FAINT, zorder=1)
    for number, arm in enumerate(arms):
        shift = 0.6 * ((number + 0.5) / len(arms) - 0.5)
        places = [place + shift for place, name in enumerate(layers) if name in arm.ranks]
        heights = [arm.ranks[name] for name in layers if name in arm.ranks]
        style = look(summary, arm) | {"linestyle": "none"}
        axes.plot(places, heights, **style, markersize=6, clip_on=False)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(0, None)
    axes.grid(visible=False, axis="x")
    long = max(map(len, layers)) * len(layers) > 70
    axes.set_xticks(
        range(len(layers)),
        [_short(name) for name in layers],
        rotation=45 if long else 0,
        ha="right" if long else "center",
    )
    axes.set_ylabel("rank of the composed weight")
    keys = [_key(summary, arm, linestyle="none") for arm in arms]
    _legend(figure, [*keys, Patch(color=FAINT, label="full rank")] if full else keys)
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
    figure, panels = _figure(3.3, len(shown))
    for axes, (name, of) in zip(panels, shown.items(), strict=True):
        for arm in summary.arms:
            curve = of(arm)
            if curve is not None:
                _line(axes, summary, arm, curve.rounds, curve)
        axes.set_title(name)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(figure, [_key(summary, arm) for arm in summary.arms if any(of(arm) for of in shown.values())])
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
    figure, (axes,) = _figure(3.5, right=(0.3 + CHARACTER_INCHES * longest) / WIDTH if is_direct else 0.0)
    for arm, curve in curves:
        _line(axes, summary, arm, curve.rounds, curve)
    if from_zero:
        axes.set_ylim(0, 1.08 * max(float((curve.mean + curve.sd).max()) for _, curve in curves) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    if is_direct:
        ends = [(curve.rounds[-1], curve.mean[-1], arm.name, _colour(summary, arm)) for arm, curve in curves]
        _label_ends(axes, ends)
    else:
        _legend(figure, [_key(summary, arm) for arm, _ in curves])
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


def _figure(height: float, columns: int = 1, *, right: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if right:
        figure.get_layout_engine().set(rect=(0, 0, 1 - right, 1))  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(panels)


def _bars(
    arms: Sequence[ArmSummary], columns: int, *, row: float = 0.34, below: float = 0.0
) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side with a row for each arm, the first on top."""
    figure = Figure(figsize=(WIDTH, 0.95 + below + row * len(arms)), layout="constrained")
    panels = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    panels[0].set_yticks(range(len(arms)), [_short(arm.name) for arm in arms])
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    for axes in panels:
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure, panels


def _line(axes: Axes, summary: Summary, arm: ArmSummary, x: np.ndarray, curve: Curve) -> None:
    style = look(summary, arm)
    axes.plot(x, curve.mean, **style, markevery=-(-len(x) // MARKERS_OF_A_LINE), zorder=3)
    if curve.seeds > 1:
        band = {"color": style["color"], "alpha": 0.16, "linewidth": 0}
        axes.fill_between(x, curve.mean - curve.sd, curve.mean + curve.sd, **band, zorder=2)


def _colour(summary: Summary, arm: ArmSummary) -> str:
    return str(look(summary, arm)["color"])


def _key(summary: Summary, arm: ArmSummary, **changes: Any) -> Line2D:
    return Line2D([], [], **look(summary, arm) | changes, label=_short(arm.name))


def _legend(figure: Figure, keys: Sequence[Any]) -> None:
    longest = max(len(str(key.get_label())) for key in keys)
    figure.legend(handles=list(keys), loc="outside lower center", ncols=max(1, min(len(keys), 90 // (longest + 7))))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the name of each line behind its end: at the right of the axes, moved as far as names would overlap.

    Args:
        axes: with its limits set.
        ends: x, the same for all, y, name and colour of each line.
    """
    apart = 0.055
    low, high = axes.get_ylim()
    _, margin = axes.get_xlim()
    order = sorted(ends, key=lambda end: end[1])
    places = np.array([(y - low) / (high - low) for _, y, _, _ in order])
    for _ in range(100):
        for one, other in pairwise(range(len(places))):
            missing = apart - (places[other] - places[one])
            if missing > 1e-6:
                places[one] -= missing / 2
                places[other] += missing / 2
    for number, place in enumerate(reversed(range(len(places)))):
        places[place] = min(places[place], 0.97 - apart * number)
    for (x, y, name, colour), place in zip(order, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "alpha": 0.6}
        text = axes.annotate(
            name, (x, y), (margin, low + place * (high - low)), color=colour, va="center", arrowprops=line
        )
        text.set_in_layout(False)


def _label_bars(axes: Axes, bars: Sequence[tuple[float, str]], arms: Sequence[ArmSummary], columns: int) -> None:
    """Write a text behind each bar, and make the axis so long that all find room.

    Args:
        axes: of the bars, which lie at 0, 1, …
        bars: length and text of each.
        arms: whose names stand at the left.
        columns: of panels in the figure.
    """
    names = CHARACTER_INCHES * max(len(_short(arm.name)) for arm in arms)
    room = (WIDTH - 0.3 - names) / columns - 0.2
    shares = [min(0.8, (0.15 + CHARACTER_INCHES * len(text)) / room) for _, text in bars]
    longest = max(length / (1 - share) for (length, _), share in zip(bars, shares, strict=True))
    axes.set_xlim(0, longest or 1.0)
    for place, (length, text) in enumerate(bars):
        colour = INK if length else MUTED
        axes.annotate(text, (length, place), (4, 0), "data", "offset points", va="center", color=colour, fontsize=8)


def _size_tick(count: float, _: int) -> str:
    return re.sub(r"\.0+ ", " ", size(count)) if count else "0"


def _short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"
