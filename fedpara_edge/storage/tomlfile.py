"""TOML from files that anyone may have written, of which Python's reader takes some beyond all bounds.

Nested values end it with a RecursionError, and the time that it takes for a dotted key grows with the square of its
parts: a minute for 100 kB.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MAX_PARTS = 100
"""Parts of a dotted key."""


def read_toml(path: Path) -> dict[str, Any]:
    """Tables of a TOML file.

    Raises:
        OSError: The file can't be read.
        ValueError: It is no UTF-8 or no TOML, or is nested too deeply.
    """
    import tomllib  # not at the top: every command imports this module, and few read TOML

    text = path.read_text(encoding="utf-8")
    try:
        if _dotted_parts(text) > MAX_PARTS:
            raise RecursionError
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("values that are nested too deeply") from error


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


_NO_KEY = re.compile(r"[\n,=\[\]{}#]|^\s*$")
