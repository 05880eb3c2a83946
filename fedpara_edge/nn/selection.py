"""Which layers of a model are converted, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from fedpara_edge.errors import InputError
from fedpara_edge.nn.layers import FactoredLayer

Value = TypeVar("Value")
LAYER_TYPES = (nn.Linear, nn.Conv2d, FactoredLayer)


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear or two-dimensional convolution layer once, by its first dotted name, in the order of the model.

    Raises:
        InputError: a lazy module has no shapes yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(f"parameter {name!r}: has no shape yet; run the model once on an example, then convert it")
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}


def check_patterns(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Every fnmatch pattern of an option matches some name.

    Raises:
        InputError: one does not, or a string was given for a list.

    >>> check_patterns("exclude", ["head"], ["body.0", "head"])
    >>> check_patterns("exclude", ["body"], ["body.0", "head"])
    Traceback (most recent call last):
    ...
    fedpara_edge.errors.InputError: exclude: 'body' matches none of the layers body.0, head; did you mean 'body.*'?
    """
    names = list(names)
    if isinstance(patterns, str):
        raise InputError(f"{option}: expected a list of patterns, found the string {patterns!r}")
    for pattern in patterns:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            inside = any(name.startswith(f"{pattern}.") for name in names)
            hint = f"; did you mean '{pattern}.*'?" if inside else ""
            raise InputError(f"{option}: {pattern!r} matches none of the layers {', '.join(names)}{hint}")


def last_match(name: str, values: Mapping[str, Value]) -> Value | None:
    """The value of the last pattern that matches, or None.

    >>> last_match("body.3", {"body.*": 0.1, "*.3": 0.5}), last_match("head", {"body.*": 0.1})
    (0.5, None)
    """
    matching = [value for pattern, value in values.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else None


def reason_to_leave(name: str, layer: nn.Module, *, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Why a layer is not to be converted, whatever its size; "" if it is."""
    if isinstance(layer, FactoredLayer):
        return "already converted"
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"{type(layer).__name__} is a subclass, which may use its weight in its own way"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"grouped convolution (groups={layer.groups})"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook"
    if not weight.requires_grad:
        return "frozen (requires_grad=False)"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks, which would be lost"
    return ""
