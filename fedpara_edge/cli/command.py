"""Commands and groups as this command line has them, on top of click's.

A renamed option is an error with its new name, an error about a parameter names it as it was given, an unknown command
is an error with the nearest one, and a group without a command prints its help.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from click.core import ParameterSource

from fedpara_edge.cli.output import emit
from fedpara_edge.errors import InputError, OutputExistsError, nearest

RENAMED = {"--force": "--overwrite"}
"""Former spellings of options that several commands share."""

USAGE = InputError.exit_code
WHOLE = 1000
"""More characters than the first sentence of any help has."""


class Command(click.Command):
    """A command of `fedpara-edge`.

    Args:
        renamed: New spelling of each option by its former one, such as `{"--server-lr": "--lr"}`.
        parameters: Arguments of `click.Command`.
    """

    def __init__(self, *parameters: Any, renamed: Mapping[str, str] | None = None, **named: Any) -> None:
        super().__init__(*parameters, **named)
        options = {option for parameter in self.params for option in parameter.opts}
        common = {old: new for old, new in RENAMED.items() if new in options}
        declared = getattr(self.callback, "renamed", {})
        self.renamed = {
            old: new for old, new in {**common, **declared, **(renamed or {})}.items() if old not in options
        }

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; a former spelling, here or in the environment, is an error with the new one."""
        if not ctx.resilient_parsing:
            self._check_environment(ctx)
        try:
            with self._naming(ctx):
                return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in self.renamed:
                raise
            raise click.UsageError(f"{error.option_name} is now {self.renamed[error.option_name]}", ctx) from error

    def present_key(self, key: str) -> str | None:
        """Present key of the configuration file for a former one; None if it is none."""
        for old, new in self.renamed.items():
            if _named(old)[0] == key.replace("-", "_"):
                name, value = _named(new)
                return f'{name} = "{value}"' if value else name
        return None

    def _check_environment(self, ctx: click.Context) -> None:
        """Refuse a variable that begins as those of the options do, and is none of them: it would be passed over."""
        known = {_variable(ctx, option) for parameter in self.params for option in parameter.opts}
        former = {_variable(ctx, old): _variable(ctx, new) for old, new in self.renamed.items()}
        for variable in sorted(os.environ):
            if variable in former:
                raise click.UsageError(f"{variable} is now {former[variable]}", ctx)
            if variable.startswith(f"{ctx.auto_envvar_prefix}_") and variable not in known:
                close = nearest(variable, known)
                remedy = f"did you mean {close}?" if close else "unset it"
                raise click.UsageError(f"{variable}: expected the name of an option of {ctx.info_name}; {remedy}", ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error about one of its parameters names it as it was given."""
        with self._naming(ctx):
            if ctx.params.pop("if_missing", False):
                return self._invoke_if_missing(ctx)
            return super().invoke(ctx)

    @contextmanager
    def _naming(self, ctx: click.Context) -> Iterator[None]:
        """Have an error about a parameter name it as it was given."""
        try:
            yield
        except InputError as error:
            for parameter in self.params:
                if error.key == parameter.name:
                    raise type(error)(error.detail, key=_as_given(ctx, parameter), code=error.code) from error
            raise

    def _invoke_if_missing(self, ctx: click.Context) -> Any:
        """Run the command unless its output is there.

        A state folder may hold a call that was cut short after its output was written. So with one the command itself
        says whether anything is left to do.
        """
        output = ctx.params["output"]
        if ctx.params["overwrite"]:
            raise click.UsageError("expected --overwrite or --if-missing, found both; leave one of them out", ctx)
        if not output.exists() or ctx.params.get("state") is not None:
            try:
                return super().invoke(ctx)
            except OutputExistsError:
                if not output.exists():
                    raise
        text = f"{output}: there already, nothing to do"
        emit({"skipped": True, "output": output}, text, as_json=ctx.params["json"])
        return None


class Group(click.Group):
    """A group of commands."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; without arguments print the help to stderr and exit with the code of a usage error."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(USAGE)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, each with the whole first sentence of its help."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(WHOLE)) for name, command in commands if command])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command as click does; an unknown one is an error with the nearest."""
        name, known = args[0], self.list_commands(ctx)
        if name in known or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        close = nearest(name, known)
        remedy = f"Did you mean {close!r}?" if close else f"There are {', '.join(known)}."
        raise click.UsageError(f"No such command {name!r}. {remedy}", ctx)


def _as_given(ctx: click.Context, parameter: click.Parameter) -> str:
    """A parameter as its value was given: its option, environment variable or key in the configuration file."""
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    option = max(parameter.opts, key=len)
    source = ctx.get_parameter_source(str(parameter.name))
    if source is ParameterSource.ENVIRONMENT:
        return _variable(ctx, option)
    return f"{parameter.name} in --config" if source is ParameterSource.DEFAULT_MAP else option


def _variable(ctx: click.Context, option: str) -> str:
    """The environment variable of an option; with its value, if it has one."""
    name, value = _named(option)
    return f"{ctx.auto_envvar_prefix}_{name.upper()}" + (f"={value}" if value else "")


def _named(option: str) -> tuple[str, str]:
    """The name of an option as Python spells it, and its value, as in `--algorithm fedprox:mu=1`."""
    name, _, value = option.lstrip("-").partition(" ")
    return name.replace("-", "_"), value
