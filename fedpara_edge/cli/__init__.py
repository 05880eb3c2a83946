"""The command line. Each command is a module here, imported only when it is called."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

import click

from fedpara_edge._version import __version__
from fedpara_edge.cli import log
from fedpara_edge.cli.command import Command, Group
from fedpara_edge.cli.output import note
from fedpara_edge.cli.streams import ReaderGoneError, safe_streams
from fedpara_edge.errors import EXIT_CODES, INTERRUPTED, FedparaError, InputError, nearest
from fedpara_edge.installation import check_package
from fedpara_edge.options import check_keys
from fedpara_edge.storage.tomlfile import read_toml

COMMANDS = {
    "export": "Make a bundle from a PyTorch model.",
    "data": "Turn images, sounds and tables into arrays.",
    "split": "Deal the rows of one data file to clients.",
    "train": "Train a bundle on local data and write an update.",
    "aggregate": "Combine updates into the next weights.",
    "merge": "Put partials of a round together into one.",
    "finalize": "Turn partials of a round into the next weights.",
    "apply": "Bring weights up to date with the changes that the server published.",
    "evaluate": "Measure loss and accuracy of weights on data.",
    "fold": "Make one inference model of a bundle and weights.",
    "predict": "Predict data with a folded model.",
    "keys": "Make keys, and root metadata that say which of them sign what.",
    "publish": "Sign bundles, weights and changes for devices, in a folder that anything can carry.",
    "serve": "Run rounds with devices and phones over the network.",
    "invite": "Show a link by which devices join a server.",
    "device": "Take part in the rounds of a server, by itself.",
    "push": "Push a bundle or weights to a repository of the Hugging Face Hub.",
    "pull": "Pull a bundle or weights from a repository of the Hugging Face Hub.",
    "audit": "Recompute published weights from the updates, to the last bit.",
    "codec": "Compare the codecs that changes are written with.",
    "inspect": "Show what is in a bundle, weights, update or state.",
    "simulate": "Run whole federations of a plan on this machine, and report on them.",
    "advise": "Find the cheapest setting for an accuracy, by short simulations.",
    "fleet": "Run the rounds of a plan on Flower, here or on many machines.",
    "report": "Report on a simulation: a page, a figure or a table of all that was measured.",
    "demo": "Compare FedPara, dense and low-rank on real images, in under 4 minutes.",
    "doctor": "Tell what this machine can run, and what to install.",
}


WITH_DEVICE_RUNTIME = (
    "export", "data", "split", "train", "evaluate", "predict", "serve", "device", "simulate", "advise",
    "fleet", "report",
)  # fmt: skip
"""Commands whose modules import `device_runtime`."""


class LazyGroup(Group):
    """A group whose commands are the modules named in `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names of the commands, in the order of a round."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command's module."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name in WITH_DEVICE_RUNTIME:
            check_package("device_runtime")
        command: click.Command = importlib.import_module(f"fedpara_edge.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), outcome) for code, outcome in EXIT_CODES.items()])


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        config = read_toml(path)
    except OSError as error:
        raise click.UsageError(f"{path}: expected a TOML file, found {error.strerror}; check the path") from error
    except ValueError as error:
        raise click.UsageError(f"{path}: expected a TOML file with a table for each command, found {error}") from error
    assert isinstance(ctx.command, LazyGroup)
    ctx.default_map = _tables(ctx, path, ctx.command, config)


def _tables(ctx: click.Context, path: Path, group: click.Group, config: dict[str, Any]) -> dict[str, Any]:
    return {name: _checked(ctx, path, group, name, table) for name, table in config.items()}


def _checked(ctx: click.Context, path: Path, group: click.Group, name: str, table: Any) -> dict[str, Any]:
    command = group.get_command(ctx, name)
    if command is None or not isinstance(table, dict):
        tables = group.list_commands(ctx)
        close = nearest(name, tables)
        hint = f"; did you mean {close}?" if close else ""
        raise click.UsageError(f"{path}: expected the tables {', '.join(tables)}, found {name!r}{hint}")
    if isinstance(command, click.Group):
        return _tables(ctx, path, command, table)
    known = {str(parameter.name): parameter for parameter in command.params if not parameter.is_eager}
    assert isinstance(command, Command)
    for key in table:
        if present := command.present_key(key):
            raise click.UsageError(f"{path}: {name}.{key} is now {present}")
    try:
        check_keys(table, known)
    except InputError as error:
        raise click.UsageError(f"{path}: {error.under(name)}") from error
    return {key: _as_typed(known[key], value) for key, value in table.items()}


def _as_typed(parameter: click.Parameter, value: Any) -> Any:
    """A TOML value as it would be typed, so that it is converted and refused as on the command line."""
    if isinstance(value, bool):
        return value
    if isinstance(value, dict):
        value = [f"{pattern}={number}" for pattern, number in value.items()]
    texts = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    several = isinstance(parameter, click.Option) and parameter.multiple
    return texts if several else ",".join(texts)


def _start_log(_: click.Context, __: click.Parameter, target: str | None) -> None:
    if target is None:
        return
    try:
        log.start(target)
    except OSError as error:
        raise click.UsageError(f"--log: {target}: expected a file to append to, found {error.strerror}") from error


@click.group(
    cls=LazyGroup, context_settings={"auto_envvar_prefix": "FEDPARA_EDGE", "help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="fedpara-edge")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    callback=_read_config,
    expose_value=False,
    help="TOML file with a table of options for each command.",
)
@click.option(
    "--log",
    metavar="FILE",
    callback=_start_log,
    is_eager=True,
    expose_value=False,
    help="File to append a JSON line to for each event; - for stderr.",
)
def fedpara_edge() -> None:
    """Train one model on many devices: export it, train it where the data is, aggregate what comes back.

    An option on the command line takes precedence over the environment variable FEDPARA_EDGE_<COMMAND>_<OPTION>, that
    over --config, and that over the default.
    """
    log.event("command_started", argv=log.without_secrets(sys.argv[1:]), version=__version__)


def main() -> None:
    """Run a command; every failure is one line on stderr and an exit code."""
    started, code = time.monotonic(), FedparaError.exit_code
    with safe_streams():
        try:
            code = _run()
        finally:
            log.event("command_ended", exit_code=code, seconds=round(time.monotonic() - started, 3))
            log.stop()
    sys.exit(code)


def _run() -> int:
    """Run the command of `sys.argv` and return its exit code."""
    try:
        code = fedpara_edge.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        return _failed(error.format_message(), code="usage", exit_code=error.exit_code)
    except FedparaError as error:
        return _failed(str(error), code=error.code, exit_code=error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _failed("interrupted", code="interrupted", exit_code=INTERRUPTED)
    except ReaderGoneError:
        return 0
    except OSError as error:
        text = f"{error.filename or 'disk'}: {error.strerror or error}"
        return _failed(text, code=FedparaError.code, exit_code=FedparaError.exit_code)
    return code if isinstance(code, int) else 0


def _failed(message: str, *, code: str, exit_code: int) -> int:
    """Report a failure on stderr and in the log."""
    note(f"Error: {message}")
    log.event("error", level=logging.ERROR, code=code, message=message)
    return exit_code
