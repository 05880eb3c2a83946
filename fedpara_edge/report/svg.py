"""SVG as written by matplotlib, turned into an element of an HTML page or a file for light and dark pages."""

from __future__ import annotations

import re
from html import escape

from fedpara_edge.report.palette import THEME


def embed(text: str, name: str, title: str) -> str:
    """The figure as an element that fills its place, each colour of `THEME` a variable of the page's style.

    Args:
        text: Text of the file.
        name: Name that no other figure of the page has; its identifiers start with it.
        title: Description that a screen reader says.

    >>> embed('<?xml?><svg xmlns="x" viewBox="0 0 1 1"><g id="a" style="fill: #262626"/></svg>', "gap", "The gap")
    '<svg role="img" aria-label="The gap" viewBox="0 0 1 1"><g id="gap-a" style="fill: var(--ink)"/></svg>'
    """
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", _element(text))
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for variable, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{variable})")
    opening, inner = text.split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', opening)
    return f'<svg role="img" aria-label="{escape(title)}" {" ".join(box)}>{inner.strip()}'


def standalone(text: str, title: str) -> str:
    """The figure as a file without date and program, with the dark colours of `THEME` where the reader prefers them.

    Every part keeps its light colour and a style sheet overrides it, so that a program without style sheets shows the
    light figure.

    Args:
        text: Text of the file.
        title: Description that a screen reader says.

    >>> print(standalone('<?xml?><svg viewBox="0 0 1 1"><g style="fill: #262626"/></svg>', "The gap"))
    <svg role="img" aria-label="The gap" viewBox="0 0 1 1"><title>The gap</title><style>
    @media (prefers-color-scheme: dark) {
    [style*="fill: #262626"] { fill: #e4e4e2 !important }
    }
    </style><g style="fill: #262626"/></svg>
    <BLANKLINE>
    """
    text = _element(text)
    rules = [
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for light, dark in THEME.values()
        for part in ("fill", "stroke")
        if f"{part}: {light}" in text
    ]
    style = "\n".join(["<style>", "@media (prefers-color-scheme: dark) {", *rules, "}", "</style>"])
    opening, inner = text.split(">", 1)
    label = escape(title)
    described = opening.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"{described}><title>{label}</title>{style}{inner.strip()}\n"


def _element(text: str) -> str:
    """The element in an SVG file, shortened: without metadata, and with coordinates to a hundredth of a point."""
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r">\s+<", ">\n<", text).replace("DejaVuSans-", "").replace("xlink:href", "href")
    text = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r" ?([A-Zz])\s*", r"\1", path[0]), text)
    return re.sub(r'\b(?:d|x|y)="[^"]*"|translate\([^)]*\)', _rounded, text)


def _rounded(places: re.Match[str]) -> str:
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), places[0])
