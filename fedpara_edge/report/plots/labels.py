"""Names, keys and numbers in a figure: legends, labels behind lines and bars, ticks in units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedpara_edge.report.palette import INK, MUTED, look
from fedpara_edge.report.plots.style import WIDTH
from fedpara_edge.report.summary import ArmSummary, Summary
from fedpara_edge.report.units import size

LABEL_CHARACTERS = 30
CHARACTER_INCHES = 0.067
"""Of labels, on average."""


def colour_of(summary: Summary, arm: ArmSummary) -> str:
    return str(look(summary, arm)["color"])


def key_of(summary: Summary, arm: ArmSummary, **changes: Any) -> Line2D:
    return Line2D([], [], **look(summary, arm) | changes, label=short(arm.name))


def legend(figure: Figure, keys: Sequence[Any]) -> None:
    longest = max(len(str(key.get_label())) for key in keys)
    figure.legend(handles=list(keys), loc="outside lower center", ncols=max(1, min(len(keys), 90 // (longest + 7))))


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
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


def label_bars(axes: Axes, bars: Sequence[tuple[float, str]], arms: Sequence[ArmSummary], columns: int) -> None:
    """Write a text behind each bar, and make the axis so long that all find room.

    Args:
        axes: of the bars, which lie at 0, 1, …
        bars: length and text of each.
        arms: whose names stand at the left.
        columns: of panels in the figure.
    """
    names = CHARACTER_INCHES * max(len(short(arm.name)) for arm in arms)
    room = (WIDTH - 0.3 - names) / columns - 0.2
    shares = [min(0.8, (0.15 + CHARACTER_INCHES * len(text)) / room) for _, text in bars]
    longest = max(length / (1 - share) for (length, _), share in zip(bars, shares, strict=True))
    axes.set_xlim(0, longest or 1.0)
    for place, (length, text) in enumerate(bars):
        colour = INK if length else MUTED
        axes.annotate(text, (length, place), (4, 0), "data", "offset points", va="center", color=colour, fontsize=8)


def size_tick(count: float, _: int) -> str:
    return re.sub(r"\.0+ ", " ", size(count)) if count else "0"


def short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"
