"""Options as fields of frozen dataclasses: their declaration, and the check of their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, get_origin, get_type_hints

from fedpara_edge.errors import InputError, brief
from fedpara_edge.options.kinds import Option, converted, describe, fits, is_optional, parsed, without_none

_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Declared:
    """An option of a dataclass.

    Args:
        name: Name of the field.
        hint: Resolved type, with None where it may be None.
        default: Default value; `dataclasses.MISSING` for an option that must be given.
        option: Further declaration.
    """

    name: str
    hint: Any
    default: Any
    option: Option

    @property
    def kind(self) -> Any:
        """The type apart from None."""
        return without_none(self.hint)

    @property
    def expected(self) -> str:
        """What a value has to be, in words: `an integer from 1 to 8`."""
        return self.option.words or describe(self.kind, self.option)

    def from_text(self, text: str) -> Any:
        """The value that is typed for the option.

        Raises:
            InputError: The text is not of the option's type, or out of its range.

        >>> Declared(name="mean", hint=tuple[float, ...], default=(0.0,), option=Option()).from_text("0.5,1")
        (0.5, 1.0)
        """
        try:
            value = parsed(self.kind, text)
        except ValueError as error:
            raise self.refuse(text) from error
        if not fits(self.kind, value, self.option):
            raise self.refuse(value)
        return value

    def from_plain(self, value: Any) -> Any:
        """The value that plain data stands for; its range is the dataclass's to check.

        Raises:
            InputError: The data is of another type.
        """
        try:
            return converted(self.kind, value)
        except (OverflowError, TypeError, ValueError) as error:
            raise self.refuse(value) from error

    def refuse(self, value: Any) -> InputError:
        """The error about a value that is something else."""
        return InputError(f"expected {self.expected}, found {brief(value)}", key=self.name)


def option(default: Any = MISSING, **declared: Any) -> Any:
    """A dataclass field that is an option.

    Args:
        default: Default value; left out for an option that must be given. A dict is copied for each object.
        declared: Fields of `Option`.
    """
    metadata = {_KEY: Option(**declared)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def declared(kind: Any) -> Mapping[str, Declared]:
    """The options of a dataclass by name, in the order of its fields."""
    return _declared(kind)


@cache
def _declared(kind: Any) -> Mapping[str, Declared]:
    hints = get_type_hints(kind)
    return {
        field.name: Declared(
            name=field.name,
            hint=hints[field.name],
            default=field.default if field.default_factory is MISSING else field.default_factory(),
            option=field.metadata[_KEY],
        )
        for field in dataclasses.fields(kind)
        if _KEY in field.metadata
    }


def check(options: Any) -> None:
    """Refuse a dataclass with a value that is not of its type or out of its range.

    Lists become tuples, and a string one of itself where strings are expected.

    Raises:
        InputError: One is, or an option has no effect beside the others; the key is the field.
    """
    for name, each in declared(type(options)).items():
        value = getattr(options, name)
        if isinstance(value, str) and each.kind == tuple[str, ...]:
            value = (value,)
            object.__setattr__(options, name, value)
        if isinstance(value, list) and get_origin(each.kind) is tuple:
            value = tuple(value)
            object.__setattr__(options, name, value)
        if not (value is None and is_optional(each.hint)) and not fits(each.kind, value, each.option):
            raise each.refuse(value)
        if value is not None and each.option.only is not None:
            other, useful = each.option.only
            if getattr(options, other) not in useful:
                raise InputError(
                    f"expected with {other} {' or '.join(useful)}, found with {getattr(options, other)}; leave it out, "
                    f"or choose another {other}",
                    key=name,
                )
