"""The directive `public`: names of `fedpara_edge`, documented from their docstrings.

```{public} train evaluate predict
```
"""

from __future__ import annotations

import inspect
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import fedpara_edge


class Public(SphinxDirective):
    """Functions and classes in the order given."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = False

    def run(self) -> list[nodes.Node]:
        """Leave each name to autodoc."""
        found: list[nodes.Node] = []
        for name in self.arguments[0].split():
            if name not in fedpara_edge.__all__:
                raise self.error(f"{name}: expected a name of fedpara_edge.__all__")
            kind = "class" if inspect.isclass(getattr(fedpara_edge, name)) else "function"
            text = f"```{{eval-rst}}\n.. auto{kind}:: fedpara_edge.{name}\n```"
            found += self.parse_text_to_nodes(text)
        return found


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("public", Public)
    return {"parallel_read_safe": True}
