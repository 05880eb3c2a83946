"""Figures with a bar, a row or a column per arm: bytes to an accuracy, seconds per round, clients, ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedpara_edge.report.palette import FAINT, MUTED, PAPER, look
from fedpara_edge.report.plots.labels import colour_of, key_of, label_bars, legend, short, show_percent, size_tick
from fedpara_edge.report.plots.style import WIDTH, panels_of
from fedpara_edge.report.summary import RATES_MBPS, ArmSummary, Summary
from fedpara_edge.report.units import percent, ratio, seconds, size

BAR = 0.62
"""Height of a bar; bars are 1 apart."""


def bytes_to_target(summary: Summary) -> Figure | None:
    """Bytes that each arm needs for the targets, and how many times fewer than the reference."""
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
                more = f"{ratio(1 / found.ratio)} as many" if found.ratio < 1 else f"{ratio(found.ratio)} fewer"
                text = f"{text}, {more}"
            axes.barh(place, sent, color=colour_of(summary, arm), height=BAR)
            bars.append((sent, text))
        label_bars(axes, bars, arms, len(panels))
        axes.set_title(f"to {percent(target)} accuracy")
        axes.xaxis.set_major_formatter(FuncFormatter(size_tick))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def seconds_per_round(summary: Summary) -> Figure | None:
    """Seconds per round of one participant, computing and sending stacked, for each rate."""
    arms = [arm for arm in summary.arms if arm.round_seconds(RATES_MBPS[0]) is not None]
    if not arms:
        return None
    figure, panels = _bars(arms, len(RATES_MBPS), below=0.3)
    for axes, rate in zip(panels, RATES_MBPS, strict=True):
        totals = [arm.round_seconds(rate) or 0.0 for arm in arms]
        for place, (arm, total) in enumerate(zip(arms, totals, strict=True)):
            computing, colour = arm.train_seconds or 0.0, colour_of(summary, arm)
            axes.barh(place, total, color=PAPER, height=BAR)  # so that no grid shines through
            axes.barh(place, total, color=colour, alpha=0.45, linewidth=0, height=BAR)
            axes.barh(place, computing, color=colour, height=BAR)
        label_bars(axes, [(total, seconds(total)) for total in totals], arms, len(panels))
        axes.set_title(f"{rate} Mbit/s")
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.set_xlabel("seconds a round")
    keys = [
        Patch(color=MUTED, label="computing (measured)"),
        Patch(color=MUTED, alpha=0.45, label="sending (computed)"),
    ]
    legend(figure, keys)
    return figure


def accuracy_of_clients(summary: Summary) -> Figure | None:
    """Accuracy of each client as a point, over a box of the middle half and the median."""
    arms = [arm for arm in summary.arms if len(arm.clients)]
    if not arms:
        return None
    figure, (axes,) = _bars(arms, 1, row=0.5)
    for place, arm in enumerate(arms):
        colour = colour_of(summary, arm)
        low, middle, high = np.quantile(arm.clients, (0.25, 0.5, 0.75))
        axes.barh(place, high - low, left=low, height=0.6, color=colour, alpha=0.3)
        axes.plot([middle, middle], [place - 0.3, place + 0.3], color=colour, linewidth=2.4, solid_capstyle="butt")
        jitter = np.random.default_rng(0).uniform(-0.22, 0.22, len(arm.clients))
        axes.plot(arm.clients, place + jitter, ".", color=colour, markersize=4, alpha=0.65, markeredgewidth=0)
    show_percent(axes.xaxis)
    axes.set_xlabel("accuracy on a client's own test examples")
    return figure


def ranks_of_layers(summary: Summary) -> Figure | None:
    """Rank of each composed weight, in front of the largest that its shape allows."""
    arms = [arm for arm in summary.arms if arm.ranks]
    layers = list(dict.fromkeys(name for arm in arms for name in arm.ranks))
    if not layers:
        return None
    full = {name: rank for arm in arms for name, rank in arm.full_ranks.items()}
    figure, (axes,) = panels_of(3.6)
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
        [short(name) for name in layers],
        rotation=45 if long else 0,
        ha="right" if long else "center",
    )
    axes.set_ylabel("rank of the composed weight")
    keys = [key_of(summary, arm, linestyle="none") for arm in arms]
    legend(figure, [*keys, Patch(color=FAINT, label="full rank")] if full else keys)
    return figure


def _bars(
    arms: Sequence[ArmSummary], columns: int, *, row: float = 0.34, below: float = 0.0
) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side with one row per arm, the first on top."""
    figure = Figure(figsize=(WIDTH, 0.95 + below + row * len(arms)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr, call-arg]
    panels = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    panels[0].set_yticks(range(len(arms)), [short(arm.name) for arm in arms])
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    for axes in panels:
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure, panels
