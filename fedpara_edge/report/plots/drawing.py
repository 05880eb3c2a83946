"""All figures of a report by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from fedpara_edge.report.plots.bars import accuracy_of_clients, bytes_to_target, ranks_of_layers, seconds_per_round
from fedpara_edge.report.plots.lines import accuracy_by_round, gap_by_round, norms_by_round
from fedpara_edge.report.plots.savings import accuracy_by_bytes
from fedpara_edge.report.plots.style import STYLE
from fedpara_edge.report.summary import Summary

DRAWERS: Mapping[str, Callable[[Summary], Figure | None]] = {
    "accuracy-by-round": accuracy_by_round,
    "accuracy-by-bytes": accuracy_by_bytes,
    "bytes-to-target": bytes_to_target,
    "seconds-per-round": seconds_per_round,
    "clients": accuracy_of_clients,
    "ranks": ranks_of_layers,
    "gap": gap_by_round,
    "norms": norms_by_round,
}
"""Functions that draw the figures, by name; they return None where nothing was measured."""


def draw(summary: Summary) -> dict[str, Figure]:
    """Draw the figures for which something was measured, by name."""
    found = {name: draw_one(summary, name) for name in DRAWERS}
    return {name: figure for name, figure in found.items() if figure is not None}


def draw_one(summary: Summary, name: str, *, title: str = "") -> Figure | None:
    """Draw one figure; None where nothing was measured for it, or no figure has that name.

    Args:
        summary: Summary to draw.
        name: Name of the figure.
        title: Title above it.
    """
    with mpl.rc_context(STYLE):
        figure = DRAWERS[name](summary) if name in DRAWERS else None
        if figure is not None and title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold")
    return figure
