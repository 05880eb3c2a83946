"""Composition of the weights in a forward graph: every layer becomes one dense operator.

The graph runs on a few examples (`tracing`). Whatever the input can't change is a constant; a constant that another
operator reads becomes an initializer, and the nodes that made it are removed. A constant that is computed from the
tensors of one layer and equals that layer's weight, or its transpose, is replaced by the weight composed in double
precision, under the layer's name. A linear layer may also be contracted, y = (x L) Rᵀ with L and R made of its factors,
so that its weight is nowhere in the graph: where L Rᵀ equals the transposed weight, the two products become one. An
LSTM or GRU has its weights by direction and with the gates in ONNX's order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.folding.inference import prune, replace
from export.forward.tracing import Batch, Shape, trace
from fedpara_edge.factors.compose import compose, part_shapes
from fedpara_edge.factors.layout import Layout

_TOLERANCE = 1e-4  # relative: a weight computed in float32 is closer, any other tensor is farther
_TRANSPOSED, _GATES = ".transposed", ".gates"
_GATE_ORDERS = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}  # i, o, f, c of torch's i, f, g, o; z, r, h of r, z, n


@dataclass(frozen=True)
class Composed:
    """Forward graph with composed weights.

    Attributes:
        model: Model in float32; the weight of a layer is the initializer `<layer>.weight` in the layer's shape, or
            `<layer>.weight.transposed` where the operator takes [I, O], or `<layer>.weight.gates` where it takes
            [directions, G H, I] for the layers of all directions.
        layers: Names of the layers that were made of factors and now have one weight.
        parameters: Names of the initializers that come from tensors of the layout.
    """

    model: onnx.ModelProto
    layers: tuple[str, ...]
    parameters: frozenset[str]


def compose_layers(source: onnx.ModelProto, layout: Layout, examples: Mapping[str, NDArray[Any]]) -> Composed:
    """Compose the weights of a forward graph.

    Args:
        source: Model from `inference.inference_graph`; not modified.
        layout: Layout of the model's tensors.
        examples: Raw inputs [N, ...] by name, with N at least 3.

    Raises:
        InputError: A size in the graph does not grow in proportion to the batch.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    known = trace(model, examples, ())
    constants = _Constants(known.constants, _origins(graph, layout), _weights(graph, layout))
    replace(graph.node, [node for node in graph.node if not known.constants.keys() >= {*node.output} - {""}])
    _fix_reshapes(graph, constants, known.shapes)
    _write_dense(graph, constants, known.shapes)
    _write_recurrent(graph, constants)
    constants.store(graph)
    prune(graph)
    names = {tensor.name for tensor in graph.initializer}
    composed = {weight for name in names for weight in constants.composed.get(name, ())}
    factored = [layer.name for layer in layout.layers if layer.kind != "dense"]
    layers = tuple(name for name in factored if _weight_name(name) in composed)
    return Composed(model, layers, frozenset(constants.parameters & names))


@dataclass(frozen=True)
class _Weight:
    """Composed weight of a layer, in float64, with the names of the tensors that it is made of."""

    name: str
    value: NDArray[Any]
    tensors: frozenset[str]


class _Constants:
    """Values that the input can't change, and the initializers that they become.

    Attributes:
        values: Values by name in the graph.
        initializers: Initializers by name.
        parameters: Names of the initializers that come from tensors of the layout.
        composed: Names of the weights in an initializer, by its name.
    """

    def __init__(
        self, values: Mapping[str, NDArray[Any]], origins: Mapping[str, frozenset[str]], weights: list[_Weight]
    ) -> None:
        self.values = dict(values)
        self.initializers: dict[str, NDArray[Any]] = {}
        self.parameters: set[str] = set()
        self.composed: dict[str, tuple[str, ...]] = {}
        self._origins = dict(origins)
        self._weights = weights
        self._read: set[str] = set()

    def add(self, name: str, value: NDArray[Any]) -> str:
        """Add a new constant as it is; return its name."""
        self.values[name] = value
        self._origins[name] = frozenset()
        return name

    def weight_in(self, value: NDArray[Any], *names: str) -> _Weight | None:
        """Weight that a value equals, in any shape, if the value is computed from the constants of these names."""
        origins = frozenset[str]().union(*(self._origins[name] for name in names))
        for weight in self._weights:
            if origins and origins <= weight.tensors and _is_close(value, weight.value):
                return weight
        return None

    def add_weight(self, weight: _Weight, *, transposed: bool) -> str:
        """Add the weight of a linear layer as an initializer; return its name."""
        name = weight.name + _TRANSPOSED * transposed
        value = weight.value.T if transposed else weight.value
        return self._keep(name, value, otherwise=name, weights=[weight])

    def add_gates(self, name: str, order: Sequence[int]) -> str:
        """Add a constant that holds the weights [directions, G H, I] of a recurrent layer as an initializer.

        Returns the name of the initializer, or that of the constant if it holds no such weights.
        """
        made_of = [weight for weight in self._weights if weight.tensors <= self._origins[name]]
        ordered = [(weight, _in_order(weight.value, order)) for weight in made_of]
        found = [pair for value in self.values[name] for pair in ordered if _is_close(value, pair[1])]
        if len(found) != len(self.values[name]):
            return name
        weights = [weight for weight, _ in found]
        return self._keep(
            weights[0].name + _GATES, np.stack([value for _, value in found]), otherwise=name, weights=weights
        )

    def store(self, graph: onnx.GraphProto) -> None:
        """Set the initializers of a graph, and make its nodes read them where they read constants."""
        self._read = {name for node in graph.node for name in node.input}
        for node in graph.node:
            replace(node.input, [self._stored(name) if name in self.values else name for name in node.input])
        replace(graph.initializer, [numpy_helper.from_array(value, name) for name, value in self.initializers.items()])

    def _stored(self, name: str) -> str:
        value, tensors = self.values[name], self._origins[name]
        if not tensors:
            self.initializers[name] = value
            return name
        if (weight := self.weight_in(value, name)) is not None:
            return self._keep(weight.name, weight.value.reshape(value.shape), otherwise=name, weights=[weight])
        if (weight := self.weight_in(value.T, name)) is not None:
            composed = weight.value.T.reshape(value.shape)
            return self._keep(weight.name + _TRANSPOSED, composed, otherwise=name, weights=[weight])
        wanted = min(tensors)
        whole = len(tensors) == 1 and value.size == self.values[wanted].size
        return self._keep(wanted if whole else name, value, otherwise=name)

    def _keep(self, name: str, value: NDArray[Any], *, otherwise: str, weights: Sequence[_Weight] = ()) -> str:
        """Store a parameter, weights in float32, under a name, or `otherwise` if that is taken; return the name."""
        if weights:
            value = value.astype(np.float32)
        there = self.initializers.get(name, value)
        if (name != otherwise and name in self._read) or not np.array_equal(there, value):
            name = otherwise
        self.initializers[name] = np.ascontiguousarray(value)
        self.parameters.add(name)
        self.composed[name] = tuple(weight.name for weight in weights)
        return name


def _in_order(weight: NDArray[Any], order: Sequence[int]) -> NDArray[Any]:
    """Weight [G H, I] with its G gates in another order."""
    if len(weight) % len(order):
        return weight
    return weight.reshape(len(order), -1)[list(order)].reshape(weight.shape)


def _origins(graph: onnx.GraphProto, layout: Layout) -> dict[str, frozenset[str]]:
    """Names of the tensors of the layout that each value is computed from, by value."""
    tensors = {tensor.name for tensor in layout.tensors}
    origins = {
        tensor.name: frozenset({tensor.name}) if tensor.name in tensors else frozenset[str]()
        for tensor in graph.initializer
    }
    for node in graph.node:
        read = () if node.op_type in ("Shape", "Size") else node.input
        made_of = frozenset[str]().union(*(origins.get(name, frozenset()) for name in read))
        origins |= dict.fromkeys(node.output, made_of)
    return origins


def _weights(graph: onnx.GraphProto, layout: Layout) -> list[_Weight]:
    """Composed weights of all layers whose tensors are in the graph."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = []
    for layer in layout.layers:
        parts = layout.parts(layer)
        names = {part: parts[part].name for part in part_shapes(layer) if part in parts}
        if tensors.keys() >= set(names.values()) and names.keys() == part_shapes(layer).keys():
            factors = {part: tensors[name].astype(np.float64) for part, name in names.items()}
            value = compose(layer, factors, np.tanh)
            weights.append(_Weight(_weight_name(layer.name), value, frozenset(names.values())))
    return weights


def _weight_name(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _is_close(value: NDArray[Any], weight: NDArray[Any]) -> bool:
    if value.size != weight.size:
        return False
    difference = float(np.linalg.norm(value.ravel() - weight.ravel()))
    return difference <= _TOLERANCE * float(np.linalg.norm(weight.ravel()))


def _fix_reshapes(graph: onnx.GraphProto, constants: _Constants, shapes: Mapping[str, Shape]) -> None:
    """Make the target of a Reshape that is computed from the shape of the input a constant, with -1 for the batch."""
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] not in constants.values:
            target = [-1 if isinstance(size, Batch) else size for size in shapes[node.output[0]]]
            if target.count(-1) == 1 and 0 not in target:
                node.input[1] = constants.add(f"{node.output[0]}.shape", np.array(target, np.int64))
                del node.attribute[:]


def _write_dense(graph: onnx.GraphProto, constants: _Constants, shapes: Mapping[str, Shape]) -> None:
    """Write x Wᵀ and (x L) Rᵀ as one product with W; for matrices x as a Gemm, which takes W as layers store it."""
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(value.name for value in graph.output)
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        right = _right_factor(node, constants)
        if right is None:
            continue
        x, weight = node.input[0], constants.weight_in(right.T, node.input[1])
        first = producers.get(x)
        if weight is None and first is not None and reads[x] == 1 and len(first.input) == 2:
            left = _right_factor(first, constants)
            if left is not None:
                x, weight = first.input[0], constants.weight_in((left @ right).T, first.input[1], node.input[1])
        if weight is None:
            continue
        matrices = len(shapes[x]) == 2
        inputs = [x, constants.add_weight(weight, transposed=not matrices), *node.input[2:]]
        node.CopyFrom(helper.make_node("Gemm" if matrices else "MatMul", inputs, list(node.output), name=node.name))
        if matrices:
            node.attribute.append(helper.make_attribute("transB", 1))


def _write_recurrent(graph: onnx.GraphProto, constants: _Constants) -> None:
    for node in graph.node:
        if node.op_type in _GATE_ORDERS:
            for index in (1, 2):
                if node.input[index] in constants.values:
                    node.input[index] = constants.add_gates(node.input[index], _GATE_ORDERS[node.op_type])


def _right_factor(node: onnx.NodeProto, constants: _Constants) -> NDArray[Any] | None:
    """Constant matrix M of a node that computes x M, or x M + c; None for any other node."""
    matrix = constants.values.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
    options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    plain = (options.get("transA", 0), options.get("alpha", 1.0), options.get("beta", 1.0)) == (0, 1.0, 1.0)
    if matrix is None or matrix.ndim != 2 or not plain or node.input[0] in constants.values:
        return None
    return matrix.T if options.get("transB", 0) else matrix
