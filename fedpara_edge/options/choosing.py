"""From what is typed for a codec or an algorithm, a name and its options, to one of several dataclasses, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING
from typing import Any, get_origin

from fedpara_edge.errors import InputError, brief, nearest
from fedpara_edge.options.declaration import Declared, declared


def choose(known: Mapping[str, Any], text: str, *, key: str, given: Mapping[str, Any] | None = None) -> Any:
    """One of several dataclasses, as it is typed: its name, and options after a colon.

    Args:
        known: Dataclasses by name, or pairs of a dataclass and its given fields.
        text: Text such as `uniform:step=2,by=tensor`.
        key: Option that the text was given for, which errors are about.
        given: Values of further options, if the dataclass has them; the text can't set them.

    Raises:
        InputError: There is none of that name, an option is unknown, comes twice or is missing, or a value is refused.

    >>> from dataclasses import dataclass
    >>> from fedpara_edge.options import option
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Prox:
    ...     mu: float = option(0.1, minimum=0)
    >>> choose({"fedprox": Prox}, "fedprox:mu=0.5", key="algorithm").mu
    0.5
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Adam:
    ...     betas: tuple[float, ...] = option((0.9, 0.99))
    ...     eps: float = option(1e-8)
    >>> choose({"adam": Adam}, "adam:betas=0.5,0.6,eps=1", key="algorithm")
    Adam(betas=(0.5, 0.6), eps=1.0)
    >>> choose({"fedprox": Prox}, "fedprox:nu=0.5", key="algorithm")
    Traceback (most recent call last):
    ...
    fedpara_edge.errors.InputError: algorithm: fedprox: nu: expected an option of it, found an unknown one; it has mu
    """
    name, _, rest = text.partition(":")
    if name not in known:
        close = nearest(name, known)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"expected one of {', '.join(known)}, found {brief(name)}{hint}", key=key)
    entry = known[name]
    kind, fixed = entry if isinstance(entry, tuple) else (entry, {})
    own = declared(kind)
    fixed = {**fixed, **{option: value for option, value in (given or {}).items() if option in own}}
    own = {option: each for option, each in own.items() if option not in fixed}
    values: dict[str, Any] = {}
    try:
        for part in _parts(rest, own):
            option, equals, typed = part.partition("=")
            if option not in own:
                known_ones = ", ".join(own) or "none"
                raise InputError(f"expected an option of it, found an unknown one; it has {known_ones}", key=option)
            if not equals or option in values:
                raise InputError(f"expected {option}={own[option].expected}, once, found {brief(part)}", key=option)
            values[option] = own[option].from_text(typed)
        for option, each in own.items():
            if option not in values and each.default is MISSING:
                raise InputError(f"expected {each.expected}, found none; write {name}:{option}=…", key=option)
        return kind(**fixed, **values)
    except InputError as error:
        raise InputError(f"{name}: {error}", key=key) from error


def _parts(rest: str, own: Mapping[str, Declared]) -> list[str]:
    """Parts between the commas; a part without a value goes on with the list in the part before it."""
    parts: list[str] = []
    for part in rest.split(",") if rest else ():
        before = own.get(parts[-1].partition("=")[0]) if parts else None
        if "=" not in part and before is not None and get_origin(before.kind) is tuple:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


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
    options = ",".join(f"{option}={_shortest(value)}" for option, value in values.items())
    return f"{name}:{options}" if options else name


def _shortest(value: Any) -> str:
    """The text of a value, with no more digits than it takes to read it back."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(_shortest(item) for item in value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
