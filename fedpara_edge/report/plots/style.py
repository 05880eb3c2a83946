"""The style that all figures share, their sizes, and the files that matplotlib makes of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedpara_edge.report.palette import FAINT, INK, MUTED, PAPER
from fedpara_edge.report.svg import embed

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


def panels_of(height: float, columns: int = 1, *, right: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if right:
        figure.get_layout_engine().set(rect=(0, 0, 1 - right, 1))  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(panels)
