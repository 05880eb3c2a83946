"""Loading of the model that a reference names: one of the zoo, or one made by the user's own code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.nn.zoo import ZOO


def load_model(reference: str, *, classes: int | None = None, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    """Dense model that `reference` names, to be factored by `convert`.

    Convert a model of the zoo with `exclude=ZOO[reference].dense_layers`.

    Args:
        reference: Name of a model in `fedpara_edge.nn.zoo.ZOO`, `package.module:factory` (the working directory is
            searched first), or `path/file.py:factory`. A factory is called without arguments and returns an
            `nn.Module`.
        classes: Number of classes of a zoo model; the model's default if None.
        input_shape: Shape of one example of a zoo model; the model's default if None.

    Returns:
        Model, dense if it is one of the zoo, otherwise as the factory made it.

    Raises:
        InputError: The reference leads to no model (the message says at which step), the user's code raised, or
            `classes` or `input_shape` is given for a model that is not one of the zoo.

    >>> sum(p.numel() for p in load_model("mlp").parameters())
    203530
    >>> load_model("mpl")  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
    ...
    fedpara_edge.errors.InputError: model 'mpl': expected mlp, cnn, vgg16, resnet18, char-lstm, har-transformer,
    mobilenetv2, mobilenetv2-0.25, mobilenetv3-small, module:factory or file.py:factory
    """
    if reference in ZOO:
        entry = ZOO[reference]
        return entry.factory(
            entry.classes if classes is None else classes, input_shape or entry.input_shape, kind="dense"
        )
    where, _, attribute = reference.rpartition(":")
    if not where or not attribute.isidentifier():
        raise InputError(f"model {reference!r}: expected {', '.join(ZOO)}, module:factory or file.py:factory")
    if classes is not None or input_shape is not None:
        raise InputError(
            f"model {reference!r}: classes and input shape are options of the zoo; set them in {attribute!r}"
        )
    with _imported(where) as module:
        factory = _find_factory(reference, module, attribute)
        with _running_user_code(f"model {reference!r}"):
            model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"model {reference!r}: expected its factory to return an nn.Module, found {_type_name(model)}")
    return model


def load_loss(reference: str) -> nn.Module:
    """Loss that `reference` names, as a module from outputs and labels to a number.

    Args:
        reference: `package.module:name` or `path/file.py:name` of a function of outputs and labels, of an `nn.Module`,
            or of a class of modules that is made without arguments.

    Raises:
        InputError: The reference leads to none, or the user's code raised.
    """
    where, _, attribute = reference.rpartition(":")
    if not where or not attribute.isidentifier():
        raise InputError(f"expected file.py:name or module:name of a loss, found {reference!r}", key="loss")
    with _imported(where) as module, _running_user_code(f"loss {reference!r}"):
        found: Any = getattr(module, attribute, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            found = found()
    if not callable(found):
        raise InputError(
            f"expected a function or module {attribute!r} in {where}, found {_type_name(found)}", key="loss"
        )
    return found if isinstance(found, nn.Module) else _Function(found)


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The function of outputs and labels."""
        return self.function(outputs, labels)


@contextmanager
def _imported(where: str) -> Iterator[ModuleType]:
    """A user's file or module, imported, with its folder first on the import path."""
    is_file = where.endswith(".py")
    with _searching(Path(where).resolve().parent if is_file else Path.cwd()):
        yield _import_file(Path(where)) if is_file else _import_module(where)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"model file {str(path)!r}: no such file (working directory {str(Path.cwd())!r})")
    name = f"_model_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"model file {str(path)!r}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the module of a class
    with _running_user_code(f"model file {str(path)!r}"):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    try:
        with _running_user_code(f"model module {name!r}"):
            return importlib.import_module(name)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            searched = f"the working directory {str(Path.cwd())!r} and the installed packages"
            raise InputError(f"model module {name!r}: not found in {searched}; a file needs its .py") from cause
        raise


def _find_factory(reference: str, module: ModuleType, attribute: str) -> Callable[[], object]:
    if not hasattr(module, attribute):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        found = ", ".join(own) or "no function of its own"
        raise InputError(f"model {reference!r}: expected a factory {attribute!r}, found {found}")
    factory: object = getattr(module, attribute)
    if isinstance(factory, nn.Module) or not callable(factory):
        found = f"an object of type {_type_name(factory)}"
        raise InputError(f"model {reference!r}: expected a function that makes the model, found {found}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise InputError(f"model {reference!r}: expected a factory that needs no arguments: {error}") from error
    return factory


def _type_name(value: object) -> str:
    return type(value).__name__


@contextmanager
def _searching(folder: Path) -> Iterator[None]:
    """Put `folder` first on the import path."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _running_user_code(what: str) -> Iterator[None]:
    """Turn an exception of the user's own code into an error in one line, with the exception as its cause."""
    try:
        yield
    except (Exception, SystemExit) as error:
        message = " ".join(f"{_type_name(error)}: {error}".split())
        raise InputError(f"{what}: {message}") from error
