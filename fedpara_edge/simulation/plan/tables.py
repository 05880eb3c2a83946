"""From a TOML table to a frozen dataclass: every key is known and every value of the type that the field has.

Lists become tuples and integers numbers where the field says so. What is out of range is the dataclass's own to refuse.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fedpara_edge.errors import InputError

Made = TypeVar("Made")
_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", Path: "a path"}


def make(kind: Callable[..., Made], table: Mapping[str, Any], *, given: Mapping[str, Any] | None = None) -> Made:
    """The dataclass with the values of a table.

    Args:
        kind: the dataclass.
        table: by name of its fields.
        given: the fields that no table may set.

    Raises:
        InputError: an unknown or missing key, a value of another type, or one that the dataclass refuses; the message
            starts with the key.

    >>> from fedpara_edge.formats.recipe import Recipe
    >>> make(Recipe, {"name": "cnn", "gamma": 0, "input_shape": [3, 32, 32]}).input_shape
    (3, 32, 32)
    >>> make(Recipe, {"name": "cnn", "gama": 0.1})
    Traceback (most recent call last):
    ...
    fedpara_edge.errors.InputError: gama: expected a key of this table, found an unknown one; did you mean gamma?
    """
    given = given or {}
    own = {field.name: field for field in fields(kind) if field.name not in given}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    check_keys(table, own)
    for name, field in own.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{name}: expected {_describe(hints[name])}, found no such key; add it")
    return kind(**given, **{name: _as(hints[name], value, name) for name, value in table.items()})


def check_keys(table: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a table with a key that is not known.

    Raises:
        InputError: it has one.
    """
    for name in table:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
            raise InputError(f"{name}: expected a key of this table, found an unknown one; {hint}")


def _as(hint: Any, value: Any, name: str) -> Any:
    """The value as the type that is asked for."""
    try:
        return _converted(hint, value)
    except TypeError as error:
        raise InputError(f"{name}: expected {_describe(hint)}, found {value!r}") from error


def _converted(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _converted(next(kind for kind in arguments if kind is not types.NoneType), value)
    if origin is Literal:
        if value not in arguments:
            raise TypeError
        return value
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise TypeError
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_converted(kind, item) for kind, item in zip(kinds, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise TypeError
        return {key: _converted(arguments[1], item) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _describe(next(kind for kind in arguments if kind is not types.NoneType))
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        item = _WORDS[arguments[0]].split()[-1]
        return f"a list of {item}s" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} {item}s"
    if origin is not None:
        return f"a table with {_describe(arguments[1])} for each key"
    return _WORDS[hint]
