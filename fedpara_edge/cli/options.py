"""Options of the command line, made from those that a dataclass declares (`fedpara_edge.options`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from fedpara_edge.errors import InputError, brief
from fedpara_edge.options import Declared, declared

DATA = "Images or sounds in a folder for each class, a .csv or .parquet table, or arrays: an .npz or a folder of .npy."
"""Help of the options that take data."""
Function = TypeVar("Function", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType


def options_of(kind: type, *, without: Collection[str] = (), into: str = "options") -> Callable[[Function], Function]:
    """Give a command the options that a dataclass declares.

    The command is called with a mapping of those that were given to their values, from which it makes the dataclass:
    what was not given has the dataclass's default.

    Args:
        kind: Dataclass.
        without: Names of options that the command doesn't have, or declares itself.
        into: Name of the mapping among the arguments of the command.
    """
    chosen = [each for name, each in declared(kind).items() if name not in without]

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(**arguments: Any) -> Any:
            found = {each.name: arguments.pop(each.name) for each in chosen}
            given = {name: value for name, value in found.items() if value not in (None, ())}
            return function(**arguments, **{into: given})

        for each in reversed(chosen):
            call = _option(each)(call)
        former = {spelled(old): spelled(each.name) for each in chosen for old in each.option.was}
        call.renamed = {**getattr(function, "renamed", {}), **former}  # type: ignore[attr-defined]  # for `cli.command.Command`
        return call  # type: ignore[return-value]

    return decorate


def spelled(name: str) -> str:
    """An option as it is typed.

    >>> spelled("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


class Typed(ParamType):
    """A value of a declared option, or one of several.

    Args:
        each: Option.
    """

    name = "value"

    def __init__(self, each: Declared) -> None:
        self._each = each

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        """The value that a text stands for; an error has the option's key.

        Raises:
            InputError: The text does not fit.
        """
        return self._each.from_text(value) if isinstance(value, str) else value

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002
        """Placeholder in `--help`: the choices, or the type."""
        if self._each.option.metavar:
            return self._each.option.metavar
        choices = _choices(self._each)
        words = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
        return f"[{'|'.join(choices)}]" if choices else words.get(self._each.kind, "VALUE")

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """The choices that begin so."""
        return [CompletionItem(choice) for choice in _choices(self._each) if choice.startswith(incomplete)]


def _option(each: Declared) -> Callable[[Function], Function]:
    several = _is_several(each)
    if each.kind is bool:
        return click.option(spelled(each.name), each.name, is_flag=True, default=None, help=each.option.help)
    return click.option(
        spelled(each.name),
        each.name,
        type=click.STRING if several else Typed(each),
        multiple=several,
        callback=functools.partial(_gather, each) if several else None,
        metavar=each.option.metavar,
        help=_help(each),
    )


def _gather(each: Declared, _: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> Any:
    """The value of an option that may be given several times."""
    if not texts:
        return None
    if get_origin(each.kind) is tuple:
        for text in texts:
            if each.option.choices and text not in each.option.choices:
                raise each.refuse(text)
        return texts
    number = get_args(each.kind)[1]
    pairs = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        try:
            if not equals:
                raise ValueError
            pairs[pattern] = number(value)
        except ValueError as error:
            raise InputError(f"expected {each.option.metavar}, found {brief(text)}", key=each.name) from error
    return pairs


def _is_several(each: Declared) -> bool:
    origin, arguments = get_origin(each.kind), get_args(each.kind)
    if origin is tuple:
        return bool(arguments[-1] is Ellipsis and arguments[0] is str)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _choices(each: Declared) -> tuple[str, ...]:
    return get_args(each.kind) if get_origin(each.kind) is Literal else tuple(each.option.choices)


def _help(each: Declared) -> str:
    option, default = each.option, each.default
    if default in (None, MISSING):
        return f"{option.help}  [default: {option.unset}]" if option.unset else option.help
    if _is_several(each) or "[default:" in option.help:
        return option.help
    items = default if isinstance(default, tuple) else (default,)
    shown = ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
    return f"{option.help}  [default: {shown}]"
