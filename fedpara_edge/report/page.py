"""One HTML page that needs nothing else: text, tables and figures, readable in light and dark and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from fedpara_edge.report.palette import THEME

STYLE = """
body { background: var(--paper); color: var(--ink); margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 56rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .4rem; }
p { margin: .4rem 0 .9rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .875rem; }
.table { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .4rem; }
th, td { padding: .28rem 0 .28rem 1.1rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child, .text { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; max-width: 8rem; }
td.text { white-space: normal; min-width: 8rem; }
td:first-child { font-weight: 600; }
tr.reference td:first-child::after { content: " (reference)"; font-weight: 400; color: var(--muted); }
figure { margin: .8rem 0 1.2rem; }
figure svg { width: 100%; height: auto; display: block; }
.note { border-left: 3px solid var(--arm-4); padding: .1rem 0 .1rem .8rem; }
pre { font: .8125rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-x: auto; }
summary { cursor: pointer; }
details { margin-top: 2.6rem; }
@page { margin: 1.6cm; }
@media print { body { max-width: none; padding: 0; font-size: 9.5pt; } table { font-size: 7.5pt; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; } .table { overflow: visible; }
  details:not([open]) { display: none; } }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Args:
        header: of the columns.
        rows: cells as they are shown; the first of each names it.
        caption: below it.
        reference: first cell of the row that is marked as the reference.
        text: numbers of the columns that are words and go to the left, besides the first.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    reference: str = ""
    text: Sequence[int] = ()

    def to_html(self) -> str:
        """As an element."""
        head = "".join(self._cell("th", place, cell) for place, cell in enumerate(self.header))
        body = "".join(
            f"<tr{_class('reference' if row[0] == self.reference else '')}>"
            f"{''.join(self._cell('td', place, cell) for place, cell in enumerate(row))}</tr>\n"
            for row in self.rows
        )
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        return f'<div class="table"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'

    def _cell(self, tag: str, place: int, text: str) -> str:
        return f"<{tag}{_class('text' if place in self.text else '')}>{escape(text)}</{tag}>"


@dataclass(frozen=True)
class Figure:
    """A figure with what it shows below it.

    Args:
        svg: the element, trusted.
        caption: what it shows.
    """

    svg: str
    caption: str

    def to_html(self) -> str:
        """As an element."""
        return f"<figure>{self.svg}<figcaption>{escape(self.caption)}</figcaption></figure>"


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Args:
        text: its words.
        role: `muted` or `note`; empty for plain text.
    """

    text: str
    role: str = ""

    def to_html(self) -> str:
        """As an element."""
        return f"<p{_class(self.role)}>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Source:
    """The text of a file, folded away.

    Args:
        name: of the file.
        text: its content.
    """

    name: str
    text: str

    def to_html(self) -> str:
        """As an element."""
        return f"<details><summary>{escape(self.name)}</summary><pre>{escape(self.text)}</pre></details>"


Block = Table | Figure | Text | Source


@dataclass(frozen=True)
class Section:
    """A heading, if it is not empty, and what comes below it."""

    heading: str
    blocks: Sequence[Block]


def render(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """The whole page."""
    light, dark = (" ".join(f"--{name}: {pair[which]};" for name, pair in THEME.items()) for which in range(2))
    body = "\n".join(
        (f"<h2>{escape(section.heading)}</h2>\n" if section.heading else "")
        + "\n".join(block.to_html() for block in section.blocks)
        for section in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
:root {{ {light} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
{STYLE.strip()}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="muted">{escape(subtitle)}</p>
{body}
</body>
</html>
"""


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
