"""Labels of a figure: legends, names and numbers beside lines and bars, ticks with units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from fedpara_edge.report.curve import Numbers
from fedpara_edge.report.palette import INK, MUTED, look
from fedpara_edge.report.plots.style import WIDTH
from fedpara_edge.report.summary import ArmSummary, Summary
from fedpara_edge.report.units import size

LABEL_CHARACTERS = 30
CHARACTER_INCHES = 0.067
"""Average width of a character in a label, in inches."""


def colour_of(summary: Summary, arm: ArmSummary) -> str:
    return str(look(summary, arm)["color"])


def key_of(summary: Summary, arm: ArmSummary, **changes: Any) -> Line2D:
    return Line2D([], [], **look(summary, arm) | changes, label=short(arm.name))


def legend(figure: Figure, keys: Sequence[Any]) -> None:
    """Write a legend below the panels; with many keys the figure grows and the panels keep their size."""
    longest = max(len(str(key.get_label())) for key in keys)
    columns = max(1, min(len(keys), 90 // (longest + 7)))
    rows = -(-len(keys) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, rows - 2))
    figure.legend(handles=list(keys), loc="outside lower center", ncols=columns)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the name of each line at the right of the axes, level with its end, moved apart where names would overlap.

    Args:
        axes: Axes with their final limits.
        ends: Place of each line's end (x, the same for all, and y), its name and its colour.
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


@dataclass(frozen=True, eq=False)
class Labelled:
    """Curve that gets its name beside it.

    Attributes:
        x: Places of its points, [N].
        y: Heights of its points, [N].
        name: Name of the curve.
        colour: Colour of the curve and its name.
    """

    x: Numbers
    y: Numbers
    name: str
    colour: str


SIDES = ((7, -3, "left", "top"), (8, -1, "left", "center"), (-8, 1, "right", "center"), (0, 9, "center", "bottom"))
"""Offsets and alignments of a name relative to a point of its curve, the best first."""
MOST_PLACES = 8
"""Number of points of a curve, from the first on, beside which its name may stand."""
CLEARANCE = 3.0
"""Distance of a name from other curves and names, in points of 1/72 inch."""


def label_curves(axes: Axes, curves: Sequence[Labelled]) -> bool:
    """Write the name of each curve beside it, clear of all curves and other names; a comma breaks the line.

    Args:
        axes: Axes with their final limits and scales.
        curves: Curves in these axes.

    Returns:
        Whether there was room for all names; if not, none is written.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # lays the axes out
    pixels = figure.dpi / 72
    drawn = {curve.name: _pixels(axes, curve) for curve in curves}
    written: list[tuple[Annotation, Bbox]] = []
    for curve in sorted(curves, key=lambda curve: float(curve.x[0])):
        others = np.concatenate([points for name, points in drawn.items() if name != curve.name] or [np.zeros((0, 2))])
        for place, side in product(range(min(len(curve.x), MOST_PLACES)), SIDES):
            text = _write(axes, curve, place, side)
            box = text.get_window_extent()
            wide = box.padded(CLEARANCE * pixels)
            is_free = not (box.count_contains(drawn[curve.name]) or wide.count_contains(others))
            if is_free and wide.count_overlaps([other for _, other in written]) == 0 and _is_inside(axes, box):
                written.append((text, box))
                break
            text.remove()
        else:
            for text, _ in written:
                text.remove()
            return False
    return True


def _write(axes: Axes, curve: Labelled, place: int, side: tuple[float, float, str, str]) -> Annotation:
    right, up, ha, va = side
    point = (float(curve.x[place]), float(curve.y[place]))
    look: Any = {"color": curve.colour, "ha": ha, "va": va, "fontweight": "bold", "linespacing": 1.1}
    return axes.annotate(curve.name.replace(", ", "\n"), point, (right, up), "data", "offset points", **look)


def _pixels(axes: Axes, curve: Labelled) -> Numbers:
    """The curve as closely spaced points, [N, 2] in pixels."""
    points = axes.transData.transform(np.column_stack([curve.x, curve.y]))
    steps = np.linspace(0, len(points) - 1, 40 * len(points))
    return np.column_stack([np.interp(steps, np.arange(len(points)), points[:, axis]) for axis in (0, 1)])


def _is_inside(axes: Axes, box: Bbox) -> bool:
    window = axes.get_window_extent()
    return bool(window.x0 <= box.x0 and box.x1 <= window.x1 and window.y0 <= box.y0 and box.y1 <= window.y1)


def label_bars(axes: Axes, bars: Sequence[tuple[float, str]], arms: Sequence[ArmSummary], columns: int) -> None:
    """Write a text behind each bar, and make the axis long enough for all of them.

    Args:
        axes: Axes with bars at 0, 1, …
        bars: Length and text of each bar.
        arms: Arms whose names stand at the left.
        columns: Number of panels in the figure.
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


def show_percent(axis: Axis) -> None:
    """Label an axis of shares in percent, at round numbers."""
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g} %"))


def short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"
