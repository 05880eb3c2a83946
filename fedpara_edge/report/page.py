"""Self-contained HTML page: text, tables and figures, readable in light, in dark and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """Table of text.

    Attributes:
        header: Names of the columns.
        rows: Cells as shown; the first of a row names it.
        caption: Caption below the table.
        reference: First cell of the row to mark as the reference.
        text: Indices of the columns with words, which are aligned left like the first.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    reference: str = ""
    text: Sequence[int] = ()

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, str]], caption: str = "", reference: str = "", text: Sequence[int] = ()
    ) -> Table:
        """Table of rows that each have their cells by the same columns."""
        return cls(list(rows[0]), [list(row.values()) for row in rows], caption, reference, text)

    def to_html(self) -> str:
        """The HTML element."""
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
    """Figure with its caption.

    Attributes:
        svg: SVG element, inserted unescaped.
        caption: Caption below the figure.
    """

    svg: str
    caption: str

    def to_html(self) -> str:
        """The HTML element."""
        return f"<figure>{self.svg}<figcaption>{escape(self.caption)}</figcaption></figure>"


@dataclass(frozen=True)
class Text:
    """Paragraph.

    Attributes:
        text: Text of the paragraph.
        role: `muted` or `note`; empty for plain text.
    """

    text: str
    role: str = ""

    def to_html(self) -> str:
        """The HTML element."""
        return f"<p{_class(self.role)}>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Source:
    """Text of a file, collapsed until opened.

    Attributes:
        name: Name of the file.
        text: Content of the file.
    """

    name: str
    text: str

    def to_html(self) -> str:
        """The HTML element."""
        return f"<details><summary>{escape(self.name)}</summary><pre>{escape(self.text)}</pre></details>"


Block = Table | Figure | Text | Source


@dataclass(frozen=True)
class Section:
    """Blocks under a heading, which may be empty."""

    heading: str
    blocks: Sequence[Block]


def render(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """The whole page as HTML."""
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
