"""All figures of a report by name."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
from matplotlib.figure import Figure

from fedpara_edge.report.plots.bars import accuracy_of_clients, bytes_to_target, ranks_of_layers, seconds_per_round
from fedpara_edge.report.plots.lines import accuracy_by_bytes, accuracy_by_round, gap_by_round, norms_by_round
from fedpara_edge.report.plots.style import STYLE
from fedpara_edge.report.summary import Summary


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
