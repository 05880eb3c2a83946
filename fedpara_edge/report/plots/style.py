"""Style and size of all figures, and the files that are made of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedpara_edge.report.curve import Curve, Numbers
from fedpara_edge.report.palette import FAINT, INK, MUTED, PAPER
from fedpara_edge.report.svg import embed, standalone

WIDTH = 7.2
PNG_DPI = 160
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


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, on white."""
    return _saved(figure, "png", PAPER, dpi=PNG_DPI, metadata={"Software": None})


def to_pdf(figure: Figure) -> bytes:
    """The figure as PDF, on white."""
    return _saved(figure, "pdf", PAPER, metadata={"CreationDate": None})


def to_svg(figure: Figure, title: str) -> bytes:
    """The figure as an SVG file, light, or dark where the reader prefers dark pages.

    Args:
        figure: Figure to write.
        title: Description that a screen reader says.
    """
    return standalone(_svg(figure, PAPER), title).encode()


def to_element(figure: Figure, name: str, title: str) -> str:
    """The figure as an element of an HTML page: transparent, as wide as its place, coloured by the page's style.

    Args:
        figure: Figure to write.
        name: Name that no other figure of the page has; its identifiers start with it.
        title: Description that a screen reader says.
    """
    return embed(_svg(figure, "none"), name, title)


def _svg(figure: Figure, background: str) -> str:
    return _saved(figure, "svg", background, metadata={"Date": None}).decode()


def _saved(figure: Figure, form: str, background: str, **options: Any) -> bytes:
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=form, facecolor=background, **options)
    return file.getvalue()


def panels_of(height: float, columns: int = 1, *, right: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    """Figure with panels side by side, and its panels.

    Args:
        height: Height of the figure in inches.
        columns: Number of panels.
        right: Share of the width to leave free at the right.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if right:
        figure.get_layout_engine().set(rect=(0, 0, 1 - right, 1))  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(panels)


def draw_band(axes: Axes, x: Numbers, curve: Curve, *, colour: str, highest: float = np.inf) -> None:
    """Draw a band of one standard deviation around a mean; nothing where there is one seed.

    Args:
        axes: Axes to draw into.
        x: Places of the points of the curve, [N].
        curve: Curve of a measure from 0 to `highest`, where the band ends.
        colour: Colour of the curve.
        highest: Largest value that the measure can have.
    """
    if curve.seeds > 1:
        low, high = (np.clip(curve.mean + side * curve.sd, 0, highest) for side in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
