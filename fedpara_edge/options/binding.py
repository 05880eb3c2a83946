"""From a table of plain data, as a plan or a configuration file has it, to a dataclass with options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

from fedpara_edge.errors import InputError, nearest
from fedpara_edge.options.declaration import declared

Made = TypeVar("Made")


def bind(
    kind: Callable[..., Made],
    table: Mapping[str, Any],
    *,
    given: Mapping[str, Any] | None = None,
    hidden: Collection[str] = (),
) -> Made:
    """The dataclass with the values of a table of plain data, as JSON and TOML have it.

    Lists become tuples, integers numbers and strings paths where the field says so.

    Args:
        kind: Dataclass.
        table: Values by the names of its options.
        given: Values of fields that no table may set.
        hidden: Further options that no table may set; they keep their defaults.

    Raises:
        InputError: An unknown, former or missing key, a value of another type, or one that the dataclass refuses.

    >>> from dataclasses import dataclass
    >>> from fedpara_edge.options import option
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Training:
    ...     momentum: float = option(0.0, minimum=0, below=1)
    ...     lr: float = option(0.05, above=0, was=("rate",))
    >>> bind(Training, {"lr": 1}).lr
    1.0
    >>> bind(Training, {"momentun": 0.1})
    Traceback (most recent call last):
    ...
    fedpara_edge.errors.InputError: momentun: expected a key of this table, found an unknown one; did you mean momentum?
    >>> bind(Training, {"rate": 0.1})
    Traceback (most recent call last):
    ...
    fedpara_edge.errors.InputError: rate: expected lr, the present name of this key, found the former one; rename it
    """
    given = given or {}
    known = {name: each for name, each in declared(kind).items() if name not in given and name not in hidden}
    check_keys(table, known, former={old: name for name, each in known.items() for old in each.option.was})
    for name, each in known.items():
        if name not in table and each.default is MISSING:
            raise InputError(f"expected {each.expected}, found no such key; add it", key=name)
    return kind(**given, **{name: known[name].from_plain(value) for name, value in table.items()})


def check_keys(table: Mapping[str, Any], known: Collection[str], *, former: Mapping[str, str] | None = None) -> None:
    """Refuse a table with a key that is not known.

    Args:
        table: Table.
        known: Keys it may have.
        former: Present names of keys that were renamed, by the former ones.

    Raises:
        InputError: It has another; the message has the nearest key, or all of them.
    """
    for name in table:
        if name in known:
            continue
        if former and name in former:
            raise InputError(
                f"expected {former[name]}, the present name of this key, found the former one; rename it", key=name
            )
        close = nearest(name, known)
        hint = f"did you mean {close}?" if close else f"the keys are {', '.join(known) or 'none'}"
        raise InputError(f"expected a key of this table, found an unknown one; {hint}", key=name)
