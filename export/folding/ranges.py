"""Values of a model that float16 would change beyond rounding, and the operators that are kept in float32 for them.

float16 has no finite number above 65504, and only coarse ones below 2⁻¹⁴, which some hardware takes for zero. Three
kinds of values are therefore kept in float32:

- *constants* outside that range, such as the -1e9 of a mask or the ε = 1e-12 of a quotient, and whatever they are
  added to or selected with, until an operator such as Softmax makes something else of them;
- *measured* values that come near the ends of the range on examples: another example may go beyond;
- *sensitive* values, whatever the examples say: squares, powers and exponentials, which grow fast, and the sums and
  roots that make a denominator or the argument of a logarithm, which must not become zero.

Products with a weight (convolutions, matrix products, recurrent layers) are kept in float32 for constants and measured
values only, as they are most of the work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

LARGEST, SMALLEST = 2.0**12, 2.0**-14
"""Magnitudes between which an example's values have to lie: a sixteenth of the range, and the smallest normal one."""
_BATCH = 8

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul"})
_SHAPING = frozenset({"Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_SELECTING = _SHAPING | {
    *("Abs", "Add", "Clip", "Concat", "Gather", "Max", "Min", "Mul", "Neg", "Pad", "Slice", "Split", "Sub", "Sum"),
    *("Tile", "Where"),
}
_GROWING = frozenset({"Exp", "Pow", "Reciprocal", "ReduceL2", "ReduceProd", "ReduceSumSquare"})
_INTO_DENOMINATORS = (
    _SHAPING
    | _GROWING
    | {
        *("Abs", "Add", "Clip", "Max", "Mul", "ReduceL1", "ReduceMean", "ReduceSum", "Sigmoid", "Softmax", "Sqrt"),
        *("Sub", "Sum"),
    }
)


@dataclass(frozen=True)
class Ranges:
    """Values and operators to keep in float32.

    Attributes:
        outside: Values that may lie outside float16's range.
        sensitive: Other values whose range matters more than the time that they take.
        nodes: Numbers of the nodes with an attribute outside the range.
    """

    outside: frozenset[str] = frozenset()
    sensitive: frozenset[str] = frozenset()
    nodes: frozenset[int] = frozenset()

    def needs_float32(self, number: int, node: NodeProto) -> bool:
        """Whether a node, by its number in the graph, is to be computed in float32."""
        values = {*node.input, *node.output}
        kept = self.outside if node.op_type in PRODUCTS else self.outside | self.sensitive
        return number in self.nodes or not kept.isdisjoint(values)

    def keeps(self, value: str) -> bool:
        """Whether a value that is computed in float32 stays in it."""
        return value in self.outside or value in self.sensitive


def find_ranges(model: onnx.ModelProto, parameters: Collection[str], magnitudes: Mapping[str, float]) -> Ranges:
    """Values of a model to keep in float32.

    Args:
        model: Model in float32, without subgraphs and Constant nodes.
        parameters: Names of the initializers that come from tensors of the layout, in which small numbers don't matter.
        magnitudes: Largest magnitude of values on examples, by name (`measure`).
    """
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    outside = {name for name, value in constants.items() if not _holds(value, tiny_too=name not in parameters)}
    for node in graph.node:
        if node.op_type in _SELECTING and not outside.isdisjoint(node.input):
            outside.update(name for name in node.output if name)
    produced = {name for node in graph.node for name in node.output if name}
    outside |= {n for n in produced if 0 < magnitudes.get(n, 0) < SMALLEST or magnitudes.get(n, 0) > LARGEST}
    nodes = {number for number, node in enumerate(graph.node) if any(map(_is_beyond, node.attribute))}
    return Ranges(frozenset(outside), frozenset(_sensitive(model, constants)), frozenset(nodes))


def float_values(model: onnx.ModelProto) -> set[str]:
    """Names of the values and initializers of a model that are float32."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = (*graph.input, *graph.value_info, *graph.output)
    floats = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}


def measure(model: onnx.ModelProto, examples: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """Largest finite magnitude of every value that a model computes, by name.

    Args:
        model: Model in float32.
        examples: Sets of raw inputs [N, ...] by name.
    """
    names = [name for node in model.graph.node for name in node.output if name]
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = InferenceSession(observed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(names, 0.0)
    batches = (
        {name: array[start : start + _BATCH] for name, array in inputs.items()}
        for inputs in examples
        for start in range(0, len(next(iter(inputs.values()))), _BATCH)
    )
    for batch in batches:
        for name, value in zip(names, session.run(names, batch), strict=True):
            if isinstance(value, np.ndarray) and value.dtype == np.float32:
                finite = np.abs(value[np.isfinite(value)])
                largest[name] = max(largest[name], float(finite.max(initial=0.0)))
    return largest


def _holds(value: NDArray[Any], *, tiny_too: bool) -> bool:
    """Whether float16 holds a constant: no finite entry becomes infinite, and not all that there is nearly zero."""
    if value.dtype != np.float32:
        return True
    finite = np.abs(value[np.isfinite(value)])
    largest = float(finite.max(initial=0.0))
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float16(largest))) and not (tiny_too and 0 < largest < SMALLEST)


def _is_beyond(attribute: onnx.AttributeProto) -> bool:
    """Whether an attribute would become infinite or zero."""
    if attribute.t.data_type == TensorProto.FLOAT:
        values = numpy_helper.to_array(attribute.t).ravel()
    else:
        values = np.array([attribute.f, *attribute.floats], np.float32)
    with np.errstate(over="ignore", under="ignore"):
        halves = values.astype(np.float16)
    return bool((np.isfinite(values) & ~np.isfinite(halves) | (values != 0) & (halves == 0)).any())


def _sensitive(model: onnx.ModelProto, constants: Mapping[str, NDArray[Any]]) -> set[str]:
    graph, changing = model.graph, float_values(model) - constants.keys()
    producers = {name: node for node in graph.node for name in node.output}
    found = {
        name
        for node in graph.node
        if node.op_type in _GROWING or (node.op_type == "Mul" and node.input[0] == node.input[1])
        for name in node.output
    }
    for value in _divisors(graph.node, constants):
        while value in producers and producers[value].op_type in _INTO_DENOMINATORS:
            found.add(value)
            inputs = changing.intersection(producers[value].input)
            if len(inputs) != 1:
                break
            (value,) = inputs
    return found


def _divisors(nodes: Iterable[NodeProto], constants: Mapping[str, NDArray[Any]]) -> Iterable[str]:
    """Values that must not become zero."""
    for node in nodes:
        if node.op_type == "Div":
            yield node.input[1]
        elif node.op_type in ("Log", "Reciprocal", "Sqrt"):
            yield node.input[0]
        elif node.op_type == "Pow":
            exponent = constants.get(node.input[1])
            if exponent is None or bool(((exponent < 1) | (exponent % 1 != 0)).any()):
                yield node.input[0]
