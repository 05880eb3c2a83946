"""Parser of a codec written as text, `NAME` or `NAME:key=value,key=value`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpara_edge.errors import InputError


def split_name(text: str) -> tuple[str, str]:
    """Name of a codec, and the text of its options.

    >>> split_name("uniform:step=2,by=tensor")
    ('uniform', 'step=2,by=tensor')
    """
    name, _, options = text.partition(":")
    return name, options


def parse_options(text: str, options: str, types: Mapping[str, type]) -> dict[str, Any]:
    """Values of the options, by name.

    Args:
        text: Whole text, for messages.
        options: Part of the text after the name.
        types: Types of the codec's options, by name.

    Raises:
        InputError: An option is unknown, comes twice or is not of its type.

    >>> parse_options("uniform:step=2", "step=2", {"step": float})
    {'step': 2.0}
    """
    found: dict[str, Any] = {}
    for option in options.split(",") if options else ():
        key, equals, value = option.partition("=")
        if key not in types or not equals or key in found:
            known = ", ".join(f"{name}=…" for name in types) or "none"
            raise InputError(f"codec {text!r}: expected the options {known}, each once, found {option!r}")
        try:
            found[key] = types[key](value)
        except ValueError as error:
            kind = {int: "an integer", float: "a number"}.get(types[key], "text")
            raise InputError(f"codec {text!r}: {key}: expected {kind}, found {value!r}") from error
    return found
