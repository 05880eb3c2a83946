"""How every command prints its result: text for people, or one JSON object."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from fedpara_edge.cli.streams import drawing, printable

Function = TypeVar("Function", bound=Callable[..., Any])


json_option = click.option("--json", is_flag=True, help="Print one JSON object to stdout and nothing else there.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


def output_options(function: Function) -> Function:
    """The options `--overwrite`, `--if-missing` (which `cli.command.Command` handles) and `--json` beside `-o`."""
    if_missing = click.option("--if-missing", is_flag=True, help="Do nothing if the output is there, and end with 0.")
    return overwrite_option(if_missing(json_option(function)))


def emit(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result as JSON, paths as text, or else the text."""
    print(json.dumps(result, allow_nan=False, default=os.fspath) if as_json else text, flush=True)


def note(message: str) -> None:
    """Print one line to stderr, whatever is in the message."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)


@contextmanager
def steps_shown() -> Iterator[Callable[[str], None]]:
    """Function that shows what is being done in one line on stderr, if that is a terminal; the line then goes."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return

    terminal = drawing(sys.stderr)

    def show(what: str) -> None:
        terminal.write(f"\r\x1b[K{printable(what)}{'…' if what else ''}")
        terminal.flush()

    try:
        yield show
    finally:
        show("")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned for a terminal: text to the left, numbers to the right.

    >>> print(table(("layer", "rank"), [("conv1", 4), ("head", 12)]))
    layer  rank
    conv1     4
    head     12
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) or _numeric(str(row[i])) for row in rows)
        for i in range(len(header))
    ]
    lines = (
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def megabytes(count: float) -> str:
    """Bytes in MB (10^6), or in kB (10^3) where that would be less than a tenth.

    >>> megabytes(1_234_567), megabytes(3802)
    ('1.23 MB', '3.8 kB')
    """
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _numeric(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("%", "").replace("-", "").strip().isdigit() or cell == "-"
