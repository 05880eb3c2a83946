"""Tables and figure of `attacks.py`: accuracy by rule, attack and share of hostile clients.

The results are those of its parts, named `RULE, SHARE %, seed SEED`, each a mapping from attacks to accuracies. What is
shown is the mean over the seeds, with the standard deviation where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fedpara_edge.report.palette import COLOURS, INK, PAPER
from fedpara_edge.report.plots.style import STYLE, panels_of, to_svg

Results = Mapping[str, Mapping[str, float]]
Rules = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""Accuracies, one for each seed, by rule, then share, then attack."""
CHANCE = 0.1
NONE = "0%"
FORGED = "impersonate"
"""The attack that signatures stop and no rule does; the worst of the others is taken without it."""
TITLE = "Accuracy by rule and attack, with 10, 20 and 30 % of the clients hostile"


def by_rule(results: Results) -> Rules:
    """Accuracies, one for each seed, by rule, then share, then attack."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for part, accuracies in results.items():
        rule, share, _ = part.rsplit(", ", 2)
        for attack, accuracy in accuracies.items():
            found.setdefault(rule, {}).setdefault(share, {}).setdefault(attack, []).append(accuracy)
    return found


def worst(accuracies: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """Accuracies under the attack with the lowest mean, but for the one that signatures stop."""
    return min((found for attack, found in accuracies.items() if attack != FORGED), key=fmean)


def report(results: Results) -> str:
    """Tables in Markdown: the worst of all attacks by share, then all attacks for each share."""
    rules = by_rule(results)
    shares = _shares(rules)
    rows = [_worst_row(rule, found, shares) for rule, found in rules.items()]
    sections = [
        "Accuracy in percent without hostile clients, and under the worst attack on a federation whose updates are "
        f"signed:\n\n<!-- worst -->\n{_table(('rule', 'none', *map(_spaced, shares)), rows)}\n<!-- end -->"
    ]
    for share in shares:
        there = {rule: found[share] for rule, found in rules.items() if share in found}
        attacks = list(next(iter(there.values())))
        rows = [(rule, *(_percent(found[attack]) for attack in attacks)) for rule, found in there.items()]
        sections.append(f"## {_spaced(share)} hostile\n\n{_table(('rule', *attacks), rows)}")
    return "\n\n".join(sections)


def _shares(rules: Rules) -> list[str]:
    return list(dict.fromkeys(share for found in rules.values() for share in found if share != NONE))


def _worst_row(rule: str, found: Mapping[str, Mapping[str, Sequence[float]]], shares: list[str]) -> tuple[str, ...]:
    none = _percent(found[NONE]["none"]) if NONE in found else ""
    return (rule, none, *(_percent(worst(found[share])) if share in found else "" for share in shares))


def draw(results: Results, path: Path) -> None:
    """Draw a cell for each rule and attack, one panel for each share: the darker, the higher the accuracy."""
    rules = by_rule(results)
    shares = _shares(rules)
    with mpl.rc_context(STYLE):
        figure, panels = panels_of(0.19 * len(rules) + 1.3, len(shares))
        for axes, share in zip(panels, shares, strict=True):
            _draw_panel(axes, rules, share, labelled=axes is panels[0])
        path.write_bytes(to_svg(figure, TITLE))


def _draw_panel(axes: Axes, rules: Rules, share: str, *, labelled: bool) -> None:
    attacks = ["none", *next(iter(rules.values()))[share]]
    for row, found in enumerate(rules.values()):
        for column, attack in enumerate(attacks):
            value = fmean(found[NONE]["none"] if attack == "none" else found[share][attack])
            shade = max(0.0, value - CHANCE) / (1 - CHANCE)
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor=COLOURS[0], alpha=shade, edgecolor=PAPER, clip_on=False)
            )
            place = {"ha": "center", "va": "center_baseline"}
            axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", size=5, color=INK, **place)
    axes.set(xlim=(0, len(attacks)), ylim=(len(rules), 0))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=6.5)
    axes.set_xticks([place + 0.5 for place in range(len(attacks))], attacks, rotation=90)
    axes.set_yticks([place + 0.5 for place in range(len(rules))], list(rules) if labelled else [""] * len(rules))
    axes.set_title(f"{_spaced(share)} hostile")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


def _spaced(share: str) -> str:
    return share.replace("%", " %")
