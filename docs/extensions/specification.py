"""The directive `specification`: the docstring of a module, which is what a file format is specified in.

    ```{specification} fedpara_edge.formats.update
    ```

The text is Markdown, as is the page. The module is not imported.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]


class Specification(SphinxDirective):
    """The docstring of the module named, below the path of its file."""

    required_arguments = 1
    has_content = False

    def run(self) -> list[nodes.Node]:
        """Parse the docstring where the directive stands."""
        name = self.arguments[0]
        path = ROOT / Path(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():
            raise self.error(f"{name}: expected a module, found none")
        self.env.note_dependency(str(path))
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text is None:
            raise self.error(f"{name}: expected a docstring, found none")
        source = nodes.paragraph("", "", nodes.inline("", f"{path.relative_to(ROOT)}", classes=["source-of"]))
        return [nodes.container("", source, *self.parse_text_to_nodes(text), classes=["specification"])]


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("specification", Specification)
    return {"parallel_read_safe": True}
