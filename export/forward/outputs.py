"""Outputs of a model by name, of those that return one tensor, a dict, a dataclass or a tuple, also nested.

    one tensor                  logits
    dict, named tuple           its keys
    dataclass                   its fields
    tuple, list                 output_0, output_1, ...
    one in another              the names of both, joined by _

A dataclass may be a dict as well, as the `ModelOutput` of Hugging Face is. What is None, or no tensor, has no name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from fedpara_edge.errors import InputError

OUTPUT = "logits"
"""Name of the only tensor that a model returns."""


@dataclass(frozen=True)
class Chosen:
    """Choice among the outputs of a model.

    Args:
        names: Names of the outputs, in the order of the graphs; none for the only floating one.
    """

    names: tuple[str, ...] = ()

    def by_name(self, result: Any) -> dict[str, torch.Tensor]:
        """Chosen outputs by name in what a model returned.

        Raises:
            InputError: One is not there, or none is chosen and there is not one floating output.
        """
        found = {name: value for name, value in named_outputs(result) if value.is_floating_point()}
        listed = ", ".join(found) or "none"
        names = self.names or tuple(found)
        if not self.names and len(found) != 1:
            raise InputError(
                f"model: expected one output of floating numbers, found {listed}; choose those to train on, "
                "such as --output-name logits"
            )
        missing = [name for name in names if name not in found]
        if missing:
            raise InputError(f"expected one of {listed}, found {missing[0]!r}", key="output_name")
        return {name: found[name] for name in names}


def named_outputs(result: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in what a model returned, in order.

    >>> [name for name, _ in named_outputs({"a": torch.zeros(1), "b": (torch.zeros(1), None)})]
    ['a', 'b_0']
    """
    if isinstance(result, torch.Tensor):
        yield OUTPUT, result
    else:
        yield from _named(result, "")


def _named(result: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in _items(result, prefix):
        if isinstance(value, torch.Tensor):
            yield name, value
        else:
            yield from _named(value, f"{name}_")


def _items(result: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(result, Mapping):
        return ((f"{prefix}{name}", value) for name, value in result.items())
    if is_dataclass(result):
        return ((f"{prefix}{field.name}", getattr(result, field.name)) for field in fields(result))
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return ((f"{prefix}{name}", value) for name, value in zip(result._fields, result, strict=True))
    if isinstance(result, tuple | list):
        return ((f"{prefix or 'output_'}{number}", value) for number, value in enumerate(result))
    return iter(())
