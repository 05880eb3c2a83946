"""From an SVG file as matplotlib writes it to an element of an HTML page, which needs nothing else."""

from __future__ import annotations

import re
from html import escape

from fedpara_edge.report.palette import THEME


def embed(text: str, name: str, title: str) -> str:
    """The figure as wide as its place, each colour of `THEME` a variable of the page's style.

    Args:
        text: of the file.
        name: that no other figure of the page has; its identifiers start with it.
        title: what a screen reader says.

    >>> embed('<?xml?><svg xmlns="x" viewBox="0 0 1 1"><g id="a" style="fill: #262626"/></svg>', "gap", "The gap")
    '<svg role="img" aria-label="The gap" viewBox="0 0 1 1"><g id="gap-a" style="fill: var(--ink)"/></svg>'
    """
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for variable, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{variable})")
    opening, inner = text.split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', opening)
    return f'<svg role="img" aria-label="{escape(title)}" {" ".join(box)}>{inner.strip()}'
