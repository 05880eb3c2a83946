"""The types and ranges that an option can have: whether a value fits, what it is made from, and how it is described."""

from __future__ import annotations

import sys
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_TOO_LARGE = 1 << 63
"""Integers from which on numpy and the disk have none."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is declared of an option besides its name, type and default.

    Args:
        help: Sentence for `--help` and the reference.
        minimum: Smallest value, or element of a tuple.
        maximum: Largest value.
        above: Number that the value exceeds.
        below: Number that the value falls short of.
        choices: Values of a string whose type does not list them.
        unset: Meaning of None, for `--help`.
        metavar: Placeholder of the value in `--help`.
        words: Description of the values, where the type and the range don't say it well.
        only: Another option, and the values of it with which this one has an effect; it is refused with others.
        was: Former names, which are refused with the present one.
    """

    help: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[str] = ()
    unset: str | None = None
    metavar: str | None = None
    words: str | None = None
    only: tuple[str, tuple[str, ...]] | None = None
    was: tuple[str, ...] = ()


def parsed(hint: Any, text: str) -> Any:
    """Value of a type that a text stands for; numbers of a tuple have commas between them.

    Raises:
        ValueError: The text stands for none.
    """
    if get_origin(hint) is tuple:
        items = text.split(",")
        return tuple(parsed(kind, item) for kind, item in zip(_items(hint, len(items)), items, strict=True))
    if hint is bool:
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in values:
            raise ValueError
        return values[text.lower()]
    return hint(text) if hint in (int, float, Path) else text


def converted(hint: Any, value: Any) -> Any:
    """Value of a type that plain data stands for, as JSON and TOML have it: lists for tuples, strings for paths.

    A string also stands for a tuple of itself.

    Raises:
        TypeError: The data is of another type.
        ValueError: It has another length.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        if isinstance(value, str) and hint == tuple[str, ...]:
            return (value,)
        if not isinstance(value, list):
            raise TypeError
        return tuple(converted(kind, item) for kind, item in zip(_items(hint, len(value)), value, strict=True))
    if origin is not None and origin is not Literal and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise TypeError
        return {key: converted(arguments[1], item) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is not Literal and type(value) is not hint:
        raise TypeError
    return value


def fits(hint: Any, value: Any, option: Option) -> bool:
    """Whether a value is of a type and in the range that is declared."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        if not isinstance(value, tuple) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            return False
        return all(fits(kind, item, option) for kind, item in zip(_items(hint, len(value)), value, strict=True))
    if origin is not None:
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and fits(arguments[1], item, option) for key, item in value.items()
        )
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max and _in_range(value, option)
    if hint is int:
        return type(value) is int and abs(value) < _TOO_LARGE and _in_range(value, option)
    if hint is str:
        return isinstance(value, str) and (not option.choices or value in option.choices)
    return isinstance(value, hint)


def _in_range(value: float, option: Option) -> bool:
    return (
        (option.minimum is None or value >= option.minimum)
        and (option.maximum is None or value <= option.maximum)
        and (option.above is None or value > option.above)
        and (option.below is None or value < option.below)
    )


def _items(hint: Any, count: int) -> list[Any]:
    """The types of the elements of a tuple of that length.

    Raises:
        ValueError: A tuple of this type has another length.
    """
    arguments = get_args(hint)
    if arguments[-1] is Ellipsis:
        return [arguments[0]] * count
    if count != len(arguments):
        raise ValueError
    return list(arguments)


def is_optional(hint: Any) -> bool:
    """Whether a type has None."""
    return types.NoneType in get_args(hint)


def without_none(hint: Any) -> Any:
    """A type apart from None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not types.NoneType)
    return hint


_WORDS: Mapping[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "booleans"),
    Path: ("a path", "paths"),
    str: ("a string", "strings"),
}


def describe(hint: Any, option: Option) -> str:
    """What a value has to be, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal or option.choices:
        names = ", ".join(arguments if origin is Literal else option.choices)
        return f"some of {names}" if origin is tuple else f"one of {names}"
    if origin is tuple:
        items = _WORDS[arguments[0]][1]
        ranged = f"{items}{_range(option)}"
        return f"a list of {ranged}" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} {ranged}"
    if origin is not None:
        return f"a table with {describe(arguments[1], option)} for each key"
    if hint is float and option.above == 0 and option.maximum is None and option.below is None:
        return "a positive number"
    return _WORDS[hint][0] + _range(option)


def _range(option: Option) -> str:
    """The range in words, with a space before it.

    >>> _range(Option(minimum=1, maximum=8)), _range(Option(above=0, maximum=1)), _range(Option())
    (' from 1 to 8', ' above 0 and at most 1', '')
    """
    low, high = option.minimum, option.maximum
    if low is not None and high is not None:
        return f" from {low} to {high}"
    bounds = [("of at least", low), ("above", option.above), ("at most", high), ("below", option.below)]
    stated = [f"{word} {bound}" for word, bound in bounds if bound is not None]
    return f" {' and '.join(stated)}" if stated else ""
