"""Journals of lines of JSON, to which a process appends; one that is killed leaves at most half a line at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import JOURNAL_BYTES, read_whole


def read_lines(path: Path, *, remedy: str) -> list[Any]:
    """What the lines of a journal say; half a line at the end is cut off.

    Args:
        path: Journal.
        remedy: Remedy for a damaged one, in an error.

    Raises:
        InputError: It can't be read, or a line is no JSON.
    """
    try:
        content = read_whole(path, max_bytes=JOURNAL_BYTES) if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
    except OSError as error:
        raise InputError(f"{path}: expected a journal, found {error.strerror}; {remedy}") from error
    return [_read(path, number, line, remedy) for number, line in enumerate(whole.splitlines(), 1)]


def _read(path: Path, number: int, line: bytes, remedy: str) -> Any:
    try:
        return strict_json(line.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: line {number}: expected JSON, found {error}; {remedy}") from error


def append_lines(path: Path, values: Iterable[Any], *, durable: bool = True) -> None:
    """Append lines to a journal, and wait until they are on the disk.

    Args:
        path: Journal, made if it is missing.
        values: Plain data, a line each.
        durable: Whether to wait; otherwise the lines outlive this process, but perhaps not a power cut.

    Raises:
        FedparaError: The disk refuses the write; the journal is as before.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(value) + "\n" for value in values))
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, before)
        raise FedparaError(f"{path}: expected to append to it, found {error.strerror or error}; free space") from error
