"""Every option of every command, given in the environment or in the configuration file, is what it is when typed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.core import ParameterSource

from fedpara_edge.cli import COMMANDS, fedpara_edge
from fedpara_edge.cli.options import Typed
from fedpara_edge.errors import InputError

PREFIX = "FEDPARA_EDGE"


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(fedpara_edge)
    for name in COMMANDS:
        command = fedpara_edge.get_command(context, name)
        if isinstance(command, click.Group):
            yield from (((name, each), command.get_command(context, each)) for each in command.list_commands(context))
        else:
            yield (name,), command


OPTIONS = [
    (names, command, parameter)
    for names, command in commands()
    for parameter in command.params
    if isinstance(parameter, click.Option) and not parameter.is_eager
]


def example(parameter: click.Parameter) -> str:
    """A text that fits a parameter."""
    kind = parameter.type
    if getattr(parameter, "is_flag", False):
        return "true"
    if isinstance(kind, Typed):
        for text in (*kind.get_metavar(parameter).strip("[]").split("|"), "1", "2,2", "0.5", "0.5,0.5", "uniform"):
            try:
                kind.convert(text, parameter, None)
            except InputError:
                continue
            return text
    if isinstance(kind, click.Choice):
        return str(kind.choices[0])
    listed = {"engines": "onnxruntime", "unbounded": "norm", "kind": "update"}
    if parameter.name in listed:
        return listed[parameter.name]
    if "=" in (parameter.metavar or ""):
        return "conv*=1"
    return {"integer": "3", "integer range": "3", "float": "0.5", "float range": "0.5"}.get(kind.name, "x,y")


def parsed(names: tuple[str, ...], arguments: list[str], *front: str) -> click.Context:
    """The context of a command whose line was parsed, and not run."""
    context = fedpara_edge.make_context("fedpara-edge", [*front, *names])
    command: click.Command = fedpara_edge
    for number, name in enumerate(names):
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None
        command = found
        last = number == len(names) - 1
        context = command.make_context(name, [*arguments] if last else list(names[number + 1 :]), parent=context)
    return context


def required(command: click.Command, without: click.Parameter) -> list[str]:
    """What must be typed whatever else is given."""
    typed = []
    for parameter in command.params:
        if parameter.required and parameter is not without:
            typed += [parameter.opts[0]] if isinstance(parameter, click.Option) else []
            typed += [example(parameter)]
    return typed


@pytest.mark.parametrize(
    ("names", "command", "option"), OPTIONS, ids=lambda value: value.name if isinstance(value, click.Option) else ""
)
def test_an_option_is_the_same_from_everywhere(
    names: tuple[str, ...],
    command: click.Command,
    option: click.Option,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not [name for name in os.environ if name.startswith(PREFIX)]
    text = example(option)
    rest = required(command, option)
    long = max(option.opts, key=len)
    typed = parsed(names, [*rest, long, *([] if option.is_flag else [text])])
    variable = "_".join([PREFIX, *names, long.lstrip("-").replace("-", "_")]).upper()
    with monkeypatch.context() as patch:
        patch.setenv(variable, text)
        environment = parsed(names, rest)
    value: Any = text if not option.is_flag else True
    file = tmp_path / "config.toml"
    key = long.lstrip("-").replace("-", "_")
    file.write_text(
        f"[{'.'.join(names)}]\n{key} = {[value] if option.multiple else repr(value)}\n".replace("True", "true")
    )
    config = parsed(names, rest, "--config", str(file))
    assert typed.params[key] == environment.params[key] == config.params[key]
    assert typed.params[key] not in (None, (), False)
    assert environment.get_parameter_source(key) is ParameterSource.ENVIRONMENT
    assert config.get_parameter_source(key) is ParameterSource.DEFAULT_MAP
