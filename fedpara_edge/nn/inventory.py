"""Inventory of a model's trained entries: by weight, by other tensor, and of all vectors together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fedpara_edge.nn.layout_of import NORMS
from fedpara_edge.nn.selection import Weight


@dataclass(frozen=True)
class Inventory:
    """Trained entries of a model, each counted once.

    Args:
        entries: Number of trained entries by name, of the weights that can be factored and of other tensors with two
            dimensions or more, in the order of the model.
        others: Reasons why those other tensors can't be factored, by name.
        vectors: Number of trained entries of biases, normalizations and other vectors.
    """

    entries: dict[str, int]
    others: dict[str, str]
    vectors: int


def take_inventory(model: nn.Module, weights: Mapping[str, Weight]) -> Inventory:
    """Count the trained entries of a model.

    Args:
        model: Model to look at.
        weights: Weights that can be factored, by name (`fedpara_edge.nn.selection.find_weights`).

    >>> from fedpara_edge.nn.selection import find_weights
    >>> model = nn.Sequential(nn.EmbeddingBag(50, 16), nn.Linear(16, 4))
    >>> take_inventory(model, find_weights(model))
    Inventory(entries={'0.weight': 800, '1': 64}, others={'0.weight': 'EmbeddingBag has no factored form'}, vectors=4)
    """
    by_layer: dict[nn.Module, list[str]] = {}
    for name, weight in weights.items():
        by_layer.setdefault(weight.layer, []).append(name)
    entries: dict[str, int] = {}
    others: dict[str, str] = {}
    vectors = 0
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        of_weights: set[int] = set()
        for name in by_layer.get(module, []):
            of_weights |= (own := {id(parameter) for parameter in weights[name].parameters})
            entries[name] = 0 if own & seen else weights[name].trained_entries
        seen |= of_weights
        for part, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            trained = parameter.numel() if parameter.requires_grad else 0
            if isinstance(module, NORMS) or sum(size > 1 for size in parameter.shape) < 2:
                vectors += trained
            else:
                name = f"{module_name}.{part}" if module_name else part
                entries[name], others[name] = trained, _why_not(module, module in by_layer)
    return Inventory(entries, others, vectors)


def _why_not(module: nn.Module, has_weights: bool) -> str:
    kind = type(module)
    if has_weights:
        return f"a part of its {kind.__name__} that is not the weight itself"
    if kind.__module__.partition(".")[0] == "torch":
        return f"{kind.__name__} has no factored form"
    return f"a parameter of {kind.__name__} itself, of no layer in it"
