"""The standard streams of a command: whatever is written is safe to show, and nothing that fails there is silent.

Names of files and clients, and messages about them, come from others. In all that commands, the library and other
packages write to stdout and stderr, characters that a terminal could obey (escape sequences, carriage returns, marks
that reverse the direction of text) or that can't be encoded (bytes of a file's name that are not UTF-8) are escaped.
What draws on a terminal, bars and colours, does so through `drawing`.

A stderr that is closed or full costs its lines, never the work or the exit code. A stdout that is full is a failure;
one that was closed from the start is taken for /dev/null, and the end of its reader for the end of the command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, cast

from fedpara_edge.errors import FedparaError


class ReaderGoneError(Exception):
    """The reader of stdout went away, as `head` does: no failure."""


@contextmanager
def safe_streams() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` as the module says, for as long as the context lasts."""
    for number in range(3):  # the next file that is opened would take the number, and library messages go into it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    streams = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = cast(TextIO, _Stream(streams[0] or nowhere, is_result=True))
        sys.stderr = cast(TextIO, _Stream(streams[1] or nowhere, is_result=False))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams


def drawing(stream: TextIO) -> TextIO:
    """A stream to draw on with control sequences; the text between them has to be `printable`."""
    return cast(TextIO, stream.drawing()) if isinstance(stream, _Stream) else stream


def printable(text: str) -> str:
    """Text whose characters, but for line feeds and tabs, are all printable; others are escaped.

    >>> printable("été\\n"), printable("\\x1b[2J\\r\\u202e\\udcff")
    ('été\\n', '\\\\x1b[2J\\\\r\\\\u202e\\\\udcff')
    """
    return "\n".join(line if line.isprintable() else _escaped(line) for line in text.split("\n"))


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)


class _Stream:
    """A text stream as the module says.

    Args:
        stream: Stream to write to.
        is_result: Whether the result of the command is written there, so that it must not be lost.
        escape: Whether what is not printable is escaped.
    """

    def __init__(self, stream: TextIO, *, is_result: bool, escape: bool = True) -> None:
        self._stream = stream
        self._is_result = is_result
        self._escape = escape
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.errors = "backslashreplace"

    def drawing(self) -> _Stream:
        return _Stream(self._stream, is_result=self._is_result, escape=False)

    def write(self, text: str | bytes) -> int:
        if isinstance(text, bytes):  # as click writes scripts of completion
            text = text.decode("utf-8", "surrogateescape")
        safe = printable(text) if self._escape else text
        safe = safe.encode(self.encoding, self.errors).decode(self.encoding)
        with self._failing():
            self._stream.write(safe)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError, ValueError):  # or what is still to be written fails again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not self._is_result:
                return
            if isinstance(error, BrokenPipeError):
                raise ReaderGoneError from error
            raise FedparaError(
                f"stdout: expected to write the result, found {error.strerror}; free space or choose another place"
            ) from error
