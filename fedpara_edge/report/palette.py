"""Colours of the report, on light and on dark pages, and the look of each arm.

An arm has the same colour, marker and line style in all figures: the reference is dark gray, the others have the
colours of Okabe and Ito, which remain distinct under every kind of colour vision; beyond seven arms, lines are dashed.
"""

from __future__ import annotations

from typing import Any

from fedpara_edge.report.summary import ArmSummary, Summary

THEME = {
    "paper": ("#ffffff", "#17181a"),
    "ink": ("#262626", "#e4e4e2"),
    "muted": ("#6f6f6f", "#a0a09c"),
    "faint": ("#dddddd", "#3a3b3e"),
    "reference": ("#555555", "#b9b9b5"),
    "arm-0": ("#0072b2", "#4aa8e0"),
    "arm-1": ("#d55e00", "#f08a3c"),
    "arm-2": ("#009e73", "#2cc295"),
    "arm-3": ("#cc79a7", "#de97bf"),
    "arm-4": ("#e69f00", "#f0b840"),
    "arm-5": ("#56b4e9", "#8bcdf2"),
    "arm-6": ("#9a6324", "#c9935a"),
}
"""Light and dark variant of each colour by its CSS variable. Figures are drawn in the light ones, all different."""

PAPER, INK, MUTED, FAINT, REFERENCE = (THEME[name][0] for name in ("paper", "ink", "muted", "faint", "reference"))
COLOURS = tuple(light for name, (light, _) in THEME.items() if name.startswith("arm-"))
MARKERS = "osD^vPX"


def look(summary: Summary, arm: ArmSummary) -> dict[str, Any]:
    """Colour, marker and line style of an arm, as keyword arguments of `plot`; no two of up to 22 arms look alike."""
    if arm.name == summary.reference:
        return {"color": REFERENCE, "marker": "o", "linestyle": "-", "markeredgewidth": 0}
    others = [other.name for other in summary.arms if other.name != summary.reference]
    number = others.index(arm.name)
    again, place = divmod(number, len(COLOURS))
    line = ("-", "--", ":")[again % 3]
    return {
        "color": COLOURS[place],
        "marker": MARKERS[(place + 1 + again) % 7],
        "linestyle": line,
        "markeredgewidth": 0,
    }
