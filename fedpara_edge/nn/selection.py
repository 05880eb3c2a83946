"""Selection of the weights of a model to convert, with the reasons for leaving the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.nn.counterparts import has_weights, is_known, parameter_of, unused_option, weight_names, weight_of
from fedpara_edge.nn.layers import FactoredLayer

Value = TypeVar("Value")
FROZEN = "frozen (requires_grad=False)"
"""Reason to leave a weight that is not trained."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that may be composed of factors.

    Args:
        layer: Module that has the weight.
        part: Name of the weight in the module: `weight`, or `weight_ih_l0`, `q_proj` and so on.
    """

    layer: nn.Module
    part: str

    @property
    def value(self) -> Tensor | None:
        """The weight as it is factored; None if there is none, as it is composed or computed."""
        return None if isinstance(self.layer, FactoredLayer) else weight_of(self.layer, self.part)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters that hold the weight, which for attention are its neighbours' as well, or its factors."""
        if isinstance(self.layer, FactoredLayer):
            return list(self.layer.factors().values())
        parameter = parameter_of(self.layer, self.part)
        return [] if parameter is None else [parameter]

    @property
    def trained_entries(self) -> int:
        """Number of entries that are trained: of the weight, or of its factors."""
        if not all(parameter.requires_grad for parameter in self.parameters):
            return sum(parameter.numel() for parameter in self.parameters if parameter.requires_grad)
        value = self.value
        return sum(parameter.numel() for parameter in self.parameters) if value is None else value.numel()


def find_weights(model: nn.Module) -> dict[str, Weight]:
    """Weights of all layers that can be factored by name, each once, in the model's order.

    The name of a weight is the dotted name of its layer; of the several that a recurrent or an attention layer has,
    each has its own after that.

    Raises:
        InputError: A lazy module has no shapes yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(f"parameter {name!r}: has no shape yet; run the model once on an example, then convert it")
    return dict(_weights(model))


def _weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    for name, module in model.named_modules():
        if isinstance(module, FactoredLayer):
            yield name, Weight(module, "weight")
        elif has_weights(module):
            for part in weight_names(module):
                own_name = [] if part == "weight" else [part]
                yield ".".join([*([name] if name else []), *own_name]), Weight(module, part)


def check_patterns(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Check that every fnmatch pattern of an option matches some name.

    Raises:
        InputError: A pattern matches none.

    >>> check_patterns("exclude", ["head"], ["body.0", "head"])
    >>> check_patterns("exclude", ["body"], ["body.0", "head"])
    Traceback (most recent call last):
    ...
    fedpara_edge.errors.InputError: exclude: 'body' matches none of the layers body.0, head; did you mean 'body.*'?
    """
    names = list(names)
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


def has_own_rank(name: str, factorization: Factorization) -> bool:
    """Whether a weight is to be factored by name: a pattern other than `*` gives it a γ or a rank."""
    patterns = {*factorization.gamma_of, *factorization.rank_of} - {"*"}
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def reason_to_leave(name: str, weight: Weight, *, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Reason not to convert a weight, whatever its size and the rest of the model; "" if there is none."""
    layer = weight.layer
    if isinstance(layer, FactoredLayer):
        return "already converted"
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if not is_known(layer):
        return f"{type(layer).__name__} is a subclass, which may use its weight in its own way"
    if any(parameter_of(layer, part) is None for part in weight_names(layer)):
        which = "its weight" if weight.part == "weight" else "one of the weights of its layer"
        return f"{which} is computed by a hook"
    if not all(parameter.requires_grad for parameter in weight.parameters):
        return FROZEN
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks, which would be lost"
    return unused_option(layer)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution with a kernel of its own for each input channel."""
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == getattr(layer, "in_channels", None)


def ties(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Names of the parameters that are some weight and belong to another module as well, by the weight's name."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full_name = f"{module_name}.{name}" if module_name else name
                owners.setdefault(id(parameter), []).append((module, full_name))
    found = {}
    for name, weight in weights.items():
        for parameter in weight.parameters:
            owned = owners[id(parameter)]
            if len(owned) > 1:
                found[name] = next((other for module, other in owned if module is not weight.layer), owned[-1][1])
    return found
