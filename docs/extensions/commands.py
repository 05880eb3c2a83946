"""The directive `commands`: every command of the command line with what its `--help` says, in its order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from fedpara_edge.cli import fedpara_edge

NAME = "fedpara-edge"


class Commands(SphinxDirective):
    """A section for the group itself and one for each command."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Parse the sections as Markdown, as the page is."""
        return self.parse_text_to_nodes("\n".join(_sections()), allow_section_headings=True)


def _sections() -> Iterator[str]:
    """Markdown of all sections."""
    context = click.Context(fedpara_edge, info_name=NAME, **fedpara_edge.context_settings)
    yield from (f"## {NAME}", "", *_body(fedpara_edge, context))
    yield from _of_group(fedpara_edge, context)


def _of_group(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, parent=context, info_name=name)
        if isinstance(command, click.Group):
            yield from _of_group(command, inner)
        else:
            yield from (f"## {inner.command_path.removeprefix(NAME).strip()}", "", *_body(command, inner))


def _body(command: click.Command, context: click.Context) -> Iterator[str]:
    """What a command does, how it is called, and its options."""
    for paragraph in (command.help or "").split("\n\n"):
        yield from (_escaped(" ".join(paragraph.split())), "")
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ("```text", f"{context.command_path} {usage}", "```", "", "| option | |", "|---|---|")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            names, text = record
            yield f"| `{names.replace('|', chr(92) + '|')}` | {_escaped(' '.join(text.split()))} |"
    yield ""


def _escaped(text: str) -> str:
    """Text without markup but for code between backticks, and options as code.

    >>> _escaped("Of *all*; pass --state or `--json`.")
    'Of \\\\*all\\\\*; pass `--state` or `--json`.'
    """
    parts = re.split(r"(`[^`]+`|(?<![\\w-])--[a-z][a-z0-9-]*)", text)
    return "".join(_as_code(part) if number % 2 else _plain(part) for number, part in enumerate(parts))


def _as_code(part: str) -> str:
    return part if part.startswith("`") else f"`{part}`"


def _plain(part: str) -> str:
    return re.sub(r"([\\\\*_<>|\[\]])", r"\\\1", part)


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
