"""Options of an algorithm: its name, its fields, and the way from what a user gave to a checked value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from fedpara_edge.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One half of a federated optimizer. Its fields are its options, which it checks when it is made.

    Attributes:
        name: Name that a user types and that files state.
    """

    name: ClassVar[str]

    def options(self) -> dict[str, Any]:
        """The options by name, plain data for `json.dumps`."""
        return asdict(self)

    def to_json(self) -> dict[str, Any]:
        """Name and options, plain data for `json.dumps`."""
        return {"name": self.name, **self.options()}


Made = TypeVar("Made", bound=Algorithm)


def make(known: Mapping[str, type[Made]], name: str, options: Mapping[str, Any]) -> Made:
    """The algorithm of a name, with options.

    Args:
        known: Algorithms by name.
        name: Key of `known`.
        options: Values by option; None where the algorithm's default is to be taken.

    Raises:
        InputError: The name is unknown, or an option is unknown, missing or out of range.
    """
    if name not in known:
        raise InputError(f"expected one of {', '.join(known)}, found {name!r}", key="algorithm")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in option_names(known[name]):
            owners = [other for other, kind in known.items() if option in option_names(kind)]
            raise InputError(
                f"expected with algorithm {' or '.join(owners) or 'none'}, found with {name}; leave it out "
                "or choose another algorithm",
                key=option,
            )
    for field in fields(known[name]):
        if field.name not in given and field.default is MISSING:
            raise InputError(f"expected a value with algorithm {name}, found none; give one", key=field.name)
    return known[name](**given)


def option_names(kind: type[Algorithm]) -> tuple[str, ...]:
    """Names of the options of an algorithm."""
    return tuple(field.name for field in fields(kind))


def check_number(
    name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Refuse a value that is not a finite number in its range.

    Raises:
        InputError: The value is no number, or out of range.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or value <= above or value >= below:
        bounds = (("of at least", least), ("above", above), ("below", below))
        stated = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
        raise InputError(f"expected a finite number {stated}, found {value!r}", key=name)
