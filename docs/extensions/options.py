"""The directive `options`: the options of a dataclass, as `fedpara_edge.options` declares them.

```{options} fedpara_edge.simulation.plan.plan.TrainPlan
:without: seed threads
```
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

from fedpara_edge.options import Declared, declared


class Options(SphinxDirective):
    """A table with a row for each option: key, what it may be, default, meaning."""

    required_arguments = 1
    has_content = False
    option_spec: ClassVar[Any] = {"without": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Write the table as Markdown, as the page is."""
        module, _, name = self.arguments[0].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        without = self.options.get("without", "").split()
        rows = [_row(each) for name, each in declared(kind).items() if name not in without]
        return self.parse_text_to_nodes("\n".join(["| key | value | default | |", "|---|---|---|---|", *rows]))


def _row(each: Declared) -> str:
    expected = each.expected.removeprefix("an ").removeprefix("a ")
    cells = (f"`{each.name}`", _plain(expected), "".join(_default(each)), _plain(each.option.help))
    return f"| {' | '.join(cells)} |"


def _default(each: Declared) -> Iterator[str]:
    if each.default is MISSING:
        yield "*needed*"
    elif each.option.unset is not None:
        yield _plain(each.option.unset)
    elif each.default not in (None, (), {}):
        yield f"`{_toml(each.default)}`"


def _toml(value: Any) -> str:
    """A value as TOML has it.

    >>> _toml(("x", "y")), _toml(1e-3), _toml(True)
    ('["x", "y"]', '0.001', 'true')
    """
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("options", Options)
    return {"parallel_read_safe": True}
