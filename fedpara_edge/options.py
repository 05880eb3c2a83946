"""Options declared once: the fields of frozen dataclasses, each with its help and its range.

    @dataclass(frozen=True, kw_only=True)
    class Training:
        lr: float = option(0.05, help="Learning rate.", above=0)

        def __post_init__(self) -> None:
            check(self)

From such a field come the check of its value, whoever makes the dataclass; the option of the command line
(`fedpara_edge.cli.options`); the key of a plan and of a configuration file (`bind`); and the option of a codec or an
algorithm as it is typed, `uniform:step=2,by=tensor` (`choose`). All of them, and all errors, have the field's own name.

The types that a field may have are `str`, `int`, `float`, `bool`, `Path`, a `Literal` of strings, `tuple[T, ...]`,
`tuple[T, T]` and `Mapping[str, T]` of these, and each of them or None.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fedpara_edge.errors import InputError, brief

Made = TypeVar("Made")

_KEY = "option"


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
        words: What a value has to be, in words, where the type and the range don't say it well.
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
        return _without_none(self.hint)

    @property
    def expected(self) -> str:
        """What a value has to be, in words: `an integer from 1 to 8`."""
        return self.option.words or _describe(self.kind, self.option)

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
    """Refuse a dataclass with a value that is not of its type or out of its range; lists become tuples.

    Raises:
        InputError: one is, or an option has no effect beside the others; the key is the field.
    """
    for name, each in declared(type(options)).items():
        value = getattr(options, name)
        if isinstance(value, list) and get_origin(each.kind) is tuple:
            value = tuple(value)
            object.__setattr__(options, name, value)
        if not (value is None and _is_optional(each.hint)) and not _fits(each.kind, value, each.option):
            raise each.refuse(value)
        if value is not None and each.option.only is not None:
            other, useful = each.option.only
            if getattr(options, other) not in useful:
                raise InputError(
                    f"expected with {other} {' or '.join(useful)}, found with {getattr(options, other)}; leave it out, "
                    f"or choose another {other}",
                    key=name,
                )


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
        InputError: an unknown, former or missing key, a value of another type, or one that the dataclass refuses.

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
    return kind(**given, **{name: _from_plain(known[name], value) for name, value in table.items()})


def check_keys(table: Mapping[str, Any], known: Collection[str], *, former: Mapping[str, str] | None = None) -> None:
    """Refuse a table with a key that is not known.

    Args:
        table: Table.
        known: Keys it may have.
        former: Present names of keys that were renamed, by the former ones.

    Raises:
        InputError: it has another; the message has the nearest key, or all of them.
    """
    for name in table:
        if name in known:
            continue
        if former and name in former:
            raise InputError(
                f"expected {former[name]}, the present name of this key, found the former one; rename it", key=name
            )
        close = get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known) or 'none'}"
        raise InputError(f"expected a key of this table, found an unknown one; {hint}", key=name)


def choose(known: Mapping[str, Any], text: str, *, key: str, given: Mapping[str, Any] | None = None) -> Any:
    """One of several dataclasses, as it is typed: its name, and options after a colon.

    Args:
        known: Dataclasses by name, or pairs of a dataclass and its given fields.
        text: Text such as `uniform:step=2,by=tensor`.
        key: Option that the text was given for, which errors are about.
        given: Values of further options, if the dataclass has them; the text can't set them.

    Raises:
        InputError: there is none of that name, an option is unknown, comes twice or is missing, or a value is refused.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Prox:
    ...     mu: float = option(0.1, minimum=0)
    >>> choose({"fedprox": Prox}, "fedprox:mu=0.5", key="algorithm").mu
    0.5
    >>> choose({"fedprox": Prox}, "fedprox:nu=0.5", key="algorithm")
    Traceback (most recent call last):
    ...
    fedpara_edge.errors.InputError: algorithm: fedprox: nu: expected an option of it, found an unknown one; it has mu
    """
    name, _, rest = text.partition(":")
    if name not in known:
        close = get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"expected one of {', '.join(known)}, found {brief(name)}{hint}", key=key)
    entry = known[name]
    kind, fixed = entry if isinstance(entry, tuple) else (entry, {})
    own = declared(kind)
    fixed = {**fixed, **{option: value for option, value in (given or {}).items() if option in own}}
    own = {option: each for option, each in own.items() if option not in fixed}
    values: dict[str, Any] = {}
    try:
        for part in rest.split(",") if rest else ():
            option, equals, typed = part.partition("=")
            if option not in own:
                raise InputError(f"expected an option of it, found an unknown one; it has {_listed(own)}", key=option)
            if not equals or option in values:
                raise InputError(f"expected {option}={own[option].expected}, once, found {brief(part)}", key=option)
            values[option] = from_text(own[option], typed)
        for option, each in own.items():
            if option not in values and each.default is MISSING:
                raise InputError(f"expected {each.expected}, found none; write {name}:{option}=…", key=option)
        return kind(**fixed, **values)
    except InputError as error:
        raise InputError(f"{name}: {error}", key=key) from error


def typed(name: str, chosen: Any, *, hidden: Collection[str] = ()) -> str:
    """The text with which `choose` makes a dataclass again: its name, and the options that are not at their defaults.

    Args:
        name: Name of the dataclass among those to choose from.
        chosen: Dataclass.
        hidden: Options that are given and not typed.
    """
    values = {
        option: getattr(chosen, option)
        for option, each in declared(chosen.__class__).items()
        if option not in hidden and getattr(chosen, option) != each.default
    }
    options = ",".join(
        f"{option}={value:g}" if isinstance(value, float) else f"{option}={value}" for option, value in values.items()
    )
    return f"{name}:{options}" if options else name


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "none"


def from_text(each: Declared, text: str) -> Any:
    """The value that is typed for an option: numbers of a tuple with commas between them.

    Raises:
        InputError: the text is not of the option's type, or out of its range.

    >>> from_text(Declared(name="mean", hint=tuple[float, ...], default=(0.0,), option=Option()), "0.5,1")
    (0.5, 1.0)
    """
    try:
        value = _from_text(each.kind, text)
    except ValueError as error:
        raise each.refuse(text) from error
    if not _fits(each.kind, value, each.option):
        raise each.refuse(value)
    return value


def _from_text(hint: Any, text: str) -> Any:
    if get_origin(hint) is tuple:
        items = text.split(",")
        return tuple(_from_text(kind, item) for kind, item in zip(_items(hint, len(items)), items, strict=True))
    if hint is bool:
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in values:
            raise ValueError
        return values[text.lower()]
    return hint(text) if hint in (int, float, Path) else text


def _from_plain(each: Declared, value: Any) -> Any:
    try:
        return _converted(each.kind, value)
    except (TypeError, ValueError) as error:
        raise each.refuse(value) from error


def _converted(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError
        return tuple(_converted(kind, item) for kind, item in zip(_items(hint, len(value)), value, strict=True))
    if origin is not None and origin is not Literal and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise TypeError
        return {key: _converted(arguments[1], item) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is not Literal and type(value) is not hint:
        raise TypeError
    return value


def _fits(hint: Any, value: Any, option: Option) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        if not isinstance(value, tuple) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            return False
        return all(_fits(kind, item, option) for kind, item in zip(_items(hint, len(value)), value, strict=True))
    if origin is not None:
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _fits(arguments[1], item, option) for key, item in value.items()
        )
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and _in_range(value, option)
    if hint is int:
        return type(value) is int and _in_range(value, option)
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
        ValueError: a tuple of this type has another length.
    """
    arguments = get_args(hint)
    if arguments[-1] is Ellipsis:
        return [arguments[0]] * count
    if count != len(arguments):
        raise ValueError
    return list(arguments)


def _is_optional(hint: Any) -> bool:
    return types.NoneType in get_args(hint)


def _without_none(hint: Any) -> Any:
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


def _describe(hint: Any, option: Option) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal or option.choices:
        names = ", ".join(arguments if origin is Literal else option.choices)
        return f"some of {names}" if origin is tuple else f"one of {names}"
    if origin is tuple:
        items = _WORDS[arguments[0]][1]
        ranged = f"{items}{_range(option)}"
        return f"a list of {ranged}" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} {ranged}"
    if origin is not None:
        return f"a table with {_describe(arguments[1], option)} for each key"
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
