"""What onnxruntime-training differentiates by itself, and what it does not or gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from export.gradients import is_detached
from export.gradients.builder import attributes
from export.gradients.rules import RULES

NATIVE = frozenset(
    {
        *("Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Cos", "Div", "Dropout", "Erf", "Exp"),
        *("Expand", "Flatten", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool"),
        *("Identity", "LSTM", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool"),
        *("Min", "Mul", "Neg", "Pad", "Pow", "Reciprocal", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceSum"),
        *("Relu", "Reshape", "ScatterElements", "ScatterND", "Sigmoid", "Sin", "Slice", "Softmax"),
        *("SoftmaxCrossEntropyLoss", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "TopK", "Transpose", "Trilu"),
        *("Unsqueeze", "Where"),
    }
)
"""Operators of ONNX that onnxruntime-training 1.19.2 differentiates on a CPU, but for those of `_EXCEPT`."""
Constants = Mapping[str, NDArray[Any]]
"""Constants of a graph, by name."""


def _copies_entries(node: NodeProto, _: Constants) -> bool:
    """Whether a Pad has a mode of its own, or names its axes, which the runtime's gradient doesn't read."""
    return attributes(node).get("mode", "constant") != "constant" or len(node.input) > 3


def _has_groups(node: NodeProto, _: Constants) -> bool:
    """Whether a Conv has groups: the runtime is slow then, and with strides in three dimensions its loss is 0."""
    return bool(attributes(node).get("group", 1) > 1)


def _has_exponents(node: NodeProto, constants: Constants) -> bool:
    """Whether a Pow has exponents that may be trained, of which the runtime takes no notice, or that are integers."""
    exponents = constants.get(node.input[1])
    return exponents is None or exponents.dtype != np.float32


def _runs_back(node: NodeProto, _: Constants) -> bool:
    return bool(attributes(node).get("direction", "forward") != "forward")


def _combines_entries(node: NodeProto, _: Constants) -> bool:
    return bool(attributes(node).get("reduction", "none") != "none")


def _steps_back(node: NodeProto, constants: Constants) -> bool:
    steps = constants.get(node.input[4]) if len(node.input) > 4 else None
    return steps is not None and bool((steps < 0).any())


_EXCEPT: dict[str, Callable[[NodeProto, Constants], bool]] = {
    "Conv": _has_groups,
    "GRU": _runs_back,
    "LSTM": _runs_back,
    "Pad": _copies_entries,
    "Pow": _has_exponents,
    "ScatterElements": _combines_entries,
    "ScatterND": _combines_entries,
    "Slice": _steps_back,
}
"""Cases in which the runtime has no gradient, a wrong one or a slow one, by operator."""


def is_foreign(node: NodeProto, constants: Constants) -> bool:
    """Whether the runtime can't differentiate a node that has a gradient."""
    if node.op_type in _EXCEPT:
        return _EXCEPT[node.op_type](node, constants)
    return node.op_type not in NATIVE and (node.op_type in RULES or is_detached(node))


def constants_of(graph: onnx.GraphProto) -> Constants:
    """Constants that a graph holds."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            (value,) = attributes(node).values()
            tensor = isinstance(value, onnx.TensorProto)
            found[node.output[0]] = numpy_helper.to_array(value) if tensor else np.array(value)
    return found
