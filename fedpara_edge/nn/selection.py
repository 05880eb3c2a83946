"""Selection of the weights of a model to convert, with the reasons for leaving the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from fedpara_edge.errors import InputError
from fedpara_edge.nn.layers import FactoredLayer

Value = TypeVar("Value")
LAYER_TYPES = (nn.Linear, nn.Conv2d, FactoredLayer)
RECURRENT_TYPES = (nn.LSTM, nn.GRU)


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that may be composed of factors.

    Args:
        layer: Module that has the weight.
        part: Name of the weight in the module: `weight`, or `weight_ih_l0` and so on.
    """

    layer: nn.Module
    part: str

    @property
    def parameter(self) -> nn.Parameter | None:
        """Parameter that holds the weight; None if there is none, as the weight is composed or computed."""
        return self.layer._parameters.get(self.part)


def find_weights(model: nn.Module) -> dict[str, Weight]:
    """Weights of all linear, two-dimensional convolution, LSTM and GRU layers by name, each once, in the model's order.

    The name of a weight is the dotted name of its layer; a recurrent layer has several, each named like its parameter.

    Raises:
        InputError: A lazy module has no shapes yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(f"parameter {name!r}: has no shape yet; run the model once on an example, then convert it")
    return dict(_weights(model))


def _weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    for name, module in model.named_modules():
        if isinstance(module, LAYER_TYPES):
            yield name, Weight(module, "weight")
        elif isinstance(module, RECURRENT_TYPES):
            for part in recurrent_weights(module):
                yield f"{name}.{part}" if name else part, Weight(module, part)


def recurrent_weights(layer: nn.LSTM | nn.GRU) -> list[str]:
    """Names of the weights of a recurrent layer, in torch's order."""
    names: list[str] = [name for group in layer._all_weights for name in group]
    return [name for name in names if name.startswith(("weight_ih", "weight_hh"))]


def check_patterns(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Check that every fnmatch pattern of an option matches some name.

    Raises:
        InputError: A pattern matches none, or a string was given instead of a list.

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
    """Value of the last pattern that matches, or None.

    >>> last_match("body.3", {"body.*": 0.1, "*.3": 0.5}), last_match("head", {"body.*": 0.1})
    (0.5, None)
    """
    matching = [value for pattern, value in values.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else None


def reason_to_leave(name: str, weight: Weight, *, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Reason not to convert a weight, whatever its size; "" if there is none."""
    layer = weight.layer
    if isinstance(layer, FactoredLayer):
        return "already converted"
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if type(layer) not in (nn.Linear, nn.Conv2d, *RECURRENT_TYPES):
        return f"{type(layer).__name__} is a subclass, which may use its weight in its own way"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"grouped convolution (groups={layer.groups})"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    if isinstance(layer, nn.LSTM) and layer.proj_size:
        return f"projected state (proj_size={layer.proj_size})"
    if isinstance(layer, RECURRENT_TYPES) and any(layer._parameters.get(p) is None for p in recurrent_weights(layer)):
        return "one of the weights of its layer is computed by a hook"
    if weight.parameter is None:
        return "its weight is computed by a hook"
    if not weight.parameter.requires_grad:
        return "frozen (requires_grad=False)"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks, which would be lost"
    return ""
