"""Docstrings as autodoc wants them: the code's are nearly Markdown, and autodoc reads reStructuredText.

Indented blocks become literal ones, tables list-tables, single backticks literals; what else would be markup is
escaped. Sections such as `Args:` are left to napoleon, which comes after this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SECTIONS = ("Args:", "Attributes:", "Example:", "Examples:", "Raises:", "References:", "Returns:", "Yields:")
CODE = re.compile(r"(`[^`]+`)")
EMPHASIS = re.compile(r"(?<![\w*])(\*\w[^*]*\w\*)(?![\w*])")


def setup(app: Any) -> dict[str, bool]:
    """Hook in before napoleon."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True}


def _process(_app: Any, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    lines[:] = list(to_rst(lines))


def to_rst(lines: list[str]) -> Iterator[str]:
    """The lines of a docstring, without common indentation, as reStructuredText for napoleon.

    >>> print("\\n".join(to_rst(["With `x`, |y|:", "", "    x_i * y", "", "Args:", "    x: A `float`."])))
    With ``x``, \\|y\\|:
    <BLANKLINE>
    .. code-block:: text
    <BLANKLINE>
        x_i * y
    <BLANKLINE>
    Args:
        x: A ``float``.
    """
    in_section = in_block = in_doctest = False
    position = 0
    while position < len(lines):
        line = lines[position]
        indented, blank = line.startswith(" "), not line.strip()
        if not blank and not indented:
            in_section, in_block = line in SECTIONS, False
        if line.startswith("|"):
            end = next((n for n in range(position, len(lines)) if not lines[n].startswith("|")), len(lines))
            yield from _table(lines[position:end])
            position = end
            continue
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and not blank)
        if indented and not blank and not in_section and not in_doctest and not in_block:
            in_block = True
            yield from (".. code-block:: text", "")
        yield line if in_block or in_doctest or blank else _inline(line)
        position += 1


def _table(rows: list[str]) -> Iterator[str]:
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not set(row) <= set("|-: ")]
    yield from ("", ".. list-table::", "   :header-rows: 1", "")
    for row in cells:
        for number, cell in enumerate(row):
            yield f"   {'*' if number == 0 else ' '} - {_inline(cell)}"
    yield ""


def _inline(text: str) -> str:
    return "".join(f"`{part}`" if part.startswith("`") else _escape(part) for part in CODE.split(text))


def _escape(text: str) -> str:
    parts = EMPHASIS.split(text)
    return "".join(part if EMPHASIS.fullmatch(part) else re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", part) for part in parts)
