"""TOML, written and read; of files that anyone may have written, Python's reader takes some beyond all bounds.

Nested values end it with a RecursionError, and the time that it takes for a dotted key grows with the square of its
parts: a minute for 100 kB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpara_edge.errors import InputError, brief
from fedpara_edge.storage.wholefile import read_text

MAX_PARTS = 100
"""Parts of a dotted key."""


def read_toml(path: Path) -> dict[str, Any]:
    """Tables of a TOML file.

    Raises:
        OSError: The file can't be read.
        ValueError: It is no UTF-8 or no TOML, or is nested too deeply.
    """
    import tomllib  # not at the top: every command imports this module, and few read TOML

    text = read_text(path)
    try:
        if _dotted_parts(text) > MAX_PARTS:
            raise RecursionError
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("values that are nested too deeply") from error


def toml_text(tables: Mapping[str, Any]) -> str:
    """TOML of nested tables of numbers, texts, booleans and lists of those, one key a line.

    Raises:
        InputError: A text can't be encoded in UTF-8, such as a file's name of other bytes.

    >>> print(toml_text({"rounds": 3, "arms": {"a.b": {"train": {"lr": 1e-05, "codec": "int4"}}}}), end="")
    rounds = 3
    arms."a.b".train.lr = 1e-05
    arms."a.b".train.codec = "int4"
    """
    return "".join(f"{key} = {value}\n" for key, value in _lines(tables))


def _lines(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in tables.items():
        name = key if _BARE_KEY.fullmatch(key) else _value(key)
        if isinstance(value, Mapping) and value:
            yield from ((f"{name}.{inner}", text) for inner, text in _lines(value))
        else:
            yield name, "{}" if isinstance(value, Mapping) else _value(value)


def _value(value: Any) -> str:
    # JSON is TOML here but for one character that TOML wants escaped.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{brief(value)}: expected text in UTF-8, found other bytes; rename it") from error
    return text


def _dotted_parts(text: str) -> int:
    """Parts of the longest dotted key, but for its first and last; strings and comments count as well.

    >>> _dotted_parts("[a.b]\\nc.'d e'.f.g = [0.1, 0.2]")
    2
    """
    longest = parts = 0
    for part in text.split("."):
        parts = 0 if _NO_KEY.search(part) else parts + 1
        longest = max(longest, parts)
    return longest


_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_NO_KEY = re.compile(r"[\n,=\[\]{}#]|^\s*$")
