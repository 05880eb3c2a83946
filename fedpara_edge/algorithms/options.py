"""Algorithms by name, with the options that a user gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from fedpara_edge.errors import InputError

Algorithm = TypeVar("Algorithm")


def make(known: Mapping[str, type[Algorithm]], name: str, options: Mapping[str, Any]) -> Algorithm:
    """The algorithm of that name.

    Args:
        known: the algorithms by name, frozen dataclasses.
        name: which one.
        options: its fields; None for one that was not given.

    Raises:
        InputError: there is none of that name, it has no such option or needs one more, or a value is out of range.
    """
    if name not in known:
        raise InputError(f"algorithm: expected one of {', '.join(known)}, found {name!r}")
    given = {option: value for option, value in options.items() if value is not None}
    own = {field.name: field for field in fields(known[name])}  # type: ignore[arg-type]
    for option in given:
        if option not in own:
            owners = [other for other, kind in known.items() if option in {f.name for f in fields(kind)}]  # type: ignore[arg-type]
            raise InputError(
                f"{option}: expected with algorithm {' or '.join(owners) or 'none'}, found with {name}; leave it out "
                "or choose another algorithm"
            )
    for option, field in own.items():
        if option not in given and field.default is MISSING:
            raise InputError(f"{option}: expected a value with algorithm {name}, found none; give one")
    return known[name](**given)


def check_number(
    name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Refuse what is no finite number in its range.

    Raises:
        InputError: as it says.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or value <= above or value >= below:
        bounds = (("of at least", least), ("above", above), ("below", below))
        stated = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
        raise InputError(f"{name}: expected a finite number {stated}, found {value!r}")
