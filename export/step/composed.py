"""Composed weights of factored layers in a forward graph, for what is done to their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.forward.tracing import trace
from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import compose, factor_shapes
from fedpara_edge.factors.layout import LayerSpec, Layout

_TOLERANCE = 1e-4  # relative: a weight computed in float32 is closer, any other value of the layer is farther


@dataclass(frozen=True)
class ComposedWeight:
    """Composed weight of a layer in a forward graph.

    Attributes:
        layer: Spec of the layer.
        factors: Names of the trained factors.
        values: Names of the weight, one for each time that it is composed.
    """

    layer: LayerSpec
    factors: tuple[str, ...]
    values: tuple[str, ...]


def composed_weights(
    forward: onnx.ModelProto,
    examples: Mapping[str, NDArray[Any]],
    layout: Layout,
    *,
    option: str,
    inner: Callable[[str], str],
) -> list[ComposedWeight]:
    """Find the composed weights of all layers with trained factors.

    A weight is recognized by its shape, by its value, and by being computed from all trained factors of its layer and
    from nothing else that changes; values that are computed from it in turn do not count.

    Args:
        forward: Forward pass.
        examples: Raw inputs [N, ...] by name, with N at least 3, to run the forward pass on.
        layout: Layout of the model.
        option: Option that needs them, for errors.
        inner: Function from the name of a tensor in the layout to its name in the graph.

    Raises:
        InputError: No layer is factored, or the weight of a factored layer is nowhere in the graph.
    """
    known = trace(forward, examples, ()).constants
    trained = {inner(tensor.name) for tensor in layout.trained}
    origins = _origins(forward.graph, {*trained, *(info.name for info in forward.graph.input)})
    found = []
    for layer in layout.layers:
        tensors = layout.parts(layer)
        names = {part: inner(tensors[part].name) for part in factor_shapes(layer)}
        factors = tuple(name for name in names.values() if name in trained)
        if layer.kind == "dense" or not factors:
            continue
        weight = compose(layer, {part: known[name].astype(np.float64) for part, name in names.items()}, np.tanh)
        same = {
            value for value in known if origins.get(value) == frozenset(factors) and _is_close(known[value], weight)
        }
        values = tuple(_first(forward.graph, same))
        if not values:
            raise InputError(
                f"layer {layer.name!r}: expected its composed weight in the graph, for {option}, found that it is "
                f"never composed; exclude that layer, or leave {option} out (nothing was written)"
            )
        found.append(ComposedWeight(layer, factors, values))
    if not found:
        raise InputError(
            "expected a layer with trained factors, found none; leave it out (nothing was written)", key=option
        )
    return found


def _origins(graph: onnx.GraphProto, sources: set[str]) -> dict[str, frozenset[str]]:
    """Sources, out of the given ones, that each value is computed from, by value."""
    origins = {name: frozenset({name}) for name in sources}
    for node in graph.node:
        read = () if node.op_type in ("Shape", "Size") else node.input
        made_of = frozenset[str]().union(*(origins.get(name, frozenset()) for name in read))
        origins |= dict.fromkeys(node.output, made_of)
    return origins


def _first(graph: onnx.GraphProto, values: set[str]) -> Iterator[str]:
    """Values, out of the given ones, that are not computed from another of them."""
    derived: set[str] = set()
    for node in graph.node:
        made = values & set(node.output)
        if derived & set(node.input):
            derived.update(node.output)
        elif made:
            derived.update(made)
            yield from made


def _is_close(value: NDArray[Any], weight: NDArray[Any]) -> bool:
    if value.shape != weight.shape:
        return False
    return float(np.linalg.norm(value - weight)) <= _TOLERANCE * float(np.linalg.norm(weight))
