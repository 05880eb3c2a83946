"""Batch normalization in the forward graph: one ONNX node for each of torch's, and those nodes in plain operators.

A node BatchNormalization in training mode stands for torch's: x [N, C, *S] is normalized by the mean and the variance
of the batch, of which running statistics take in a share of 1 - `momentum`, the variance with a divisor of N|S| - 1
(ONNX has N|S|). Runtimes don't get to see it: stock onnxruntime may compute something else without a word, and
onnxruntime-training can't load it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxscript import opset18 as op

OPERATOR = "BatchNormalization"


def with_statistics(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> Any:
    """`aten._native_batch_norm_legit_functional`: normalization by the batch, which statistics take in."""
    del training
    channels = int(x.shape[1])
    scale = _filled(1.0, channels) if weight is None else weight
    shift = _filled(0.0, channels) if bias is None else bias
    y, new_mean, new_variance = op.BatchNormalization(
        x, scale, shift, mean, variance, epsilon=eps, momentum=1 - momentum, training_mode=1
    )
    return y, new_mean, new_variance, new_mean, new_variance


def without_statistics(x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> Any:
    """`aten._native_batch_norm_legit.no_stats`: normalization by the batch, and nothing that is kept."""
    del training, momentum
    channels = int(x.shape[1])
    scale = _filled(1.0, channels) if weight is None else weight
    shift = _filled(0.0, channels) if bias is None else bias
    none = _filled(0.0, channels)
    outputs: Any = op.BatchNormalization(x, scale, shift, none, none, epsilon=eps, training_mode=1)
    return outputs


def _filled(value: float, channels: int) -> Any:
    return op.Constant(value=numpy_helper.from_array(np.full(channels, value, np.float32)))


def new_statistics(model: onnx.ModelProto) -> dict[str, str]:
    """Values that hold the running statistics after a batch, by tensor, as they are before it."""
    tensors = {tensor.name for tensor in model.graph.initializer}
    source: dict[str, str] = {}
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == OPERATOR:
            for old, new in zip(node.input[3:], node.output[1:], strict=False):
                source[new] = source.get(old, old)
                if source[new] in tensors:
                    found[source[new]] = new  # of the last, where a module is called several times
    return found


def in_plain_operators(model: onnx.ModelProto) -> onnx.ModelProto:
    """Model with operators that every runtime computes and differentiates alike in place of batch normalization."""
    if not any(node.op_type == OPERATOR for node in model.graph.node):
        return model
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    ranks = _ranks(model)
    del plain.graph.node[:]
    for node in model.graph.node:
        if node.op_type == OPERATOR:
            _append_steps(_Steps(plain.graph, node), ranks[node.input[0]])
        else:
            plain.graph.node.append(node)
    return plain


def by_running_statistics(plain: onnx.GraphProto, model: onnx.ModelProto) -> None:
    """Normalize by running statistics instead of the batch's, in place, where there are any.

    Args:
        plain: Graph of `in_plain_operators`, or one that was made from it.
        model: Model before that.
    """
    tensors = {tensor.name for tensor in model.graph.initializer}
    replaced: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == OPERATOR and node.input[3] in tensors:
            y, (mean, variance) = node.output[0], node.input[3:]
            replaced[f"{y}.mean"] = [helper.make_node("Reshape", [mean, f"{y}.channels"], [f"{y}.mean"])]
            replaced[f"{y}.variance"] = [
                helper.make_node("Max", [variance, f"{y}.zero"], [f"{y}.variance_before"]),
                helper.make_node("Reshape", [f"{y}.variance_before", f"{y}.channels"], [f"{y}.variance"]),
            ]
    nodes = [new for node in plain.node for new in replaced.get(node.output[0], [node])]
    del plain.node[:]
    plain.node.extend(nodes)


class _Steps:
    """Nodes in place of a BatchNormalization, whose names and values begin with its own."""

    def __init__(self, graph: onnx.GraphProto, node: NodeProto) -> None:
        self.graph, self.node = graph, node

    def constant(self, name: str, values: Any, dtype: Any) -> str:
        """Store a constant and return its name."""
        name = f"{self.node.output[0]}.{name}"
        self.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def append(self, name: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        return self.define(f"{self.node.output[0]}.{name}", operator, *inputs, **attributes)

    def define(self, value: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with an output of a given name, and return that."""
        name = value.replace(self.node.output[0], self.node.name, 1)
        self.graph.node.append(helper.make_node(operator, list(inputs), [value], name=name, **attributes))
        return value


def _append_steps(steps: _Steps, rank: int) -> None:
    given = {attribute.name: attribute.f for attribute in steps.node.attribute}
    x, scale, shift = steps.node.input[:3]
    axes = steps.constant("axes", [0, *range(2, rank)], np.int64)
    channels = steps.constant("channels", [-1, *[1] * (rank - 2)], np.int64)
    mean = steps.append("mean", "ReduceMean", x, axes)
    centred = steps.append("centred", "Sub", x, mean)
    variance = steps.append("variance", "ReduceMean", steps.append("square", "Mul", centred, centred), axes)
    raised = steps.append("raised", "Add", variance, steps.constant("epsilon", given.get("epsilon", 1e-5), np.float32))
    normal = steps.append("normal", "Div", centred, steps.append("deviation", "Sqrt", raised))
    scaled = steps.append("scaled", "Mul", normal, steps.append("scale", "Reshape", scale, channels))
    steps.define(steps.node.output[0], "Add", scaled, steps.append("shift", "Reshape", shift, channels))
    found = {tensor.name: list(tensor.dims) for tensor in steps.graph.initializer}
    if steps.node.input[3] in found:
        size = found[steps.node.input[3]]
        _append_statistics(steps, mean, variance, channels=size[0], kept=given.get("momentum", 0.9))
        for name in steps.node.output[1:]:
            steps.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, size))


def _append_statistics(steps: _Steps, mean: str, variance: str, *, channels: int, kept: float) -> None:
    size = steps.append("size", "Cast", steps.append("entries", "Size", steps.node.input[0]), to=TensorProto.FLOAT)
    count = steps.append("count", "Mul", size, steps.constant("share", 1 / channels, np.float32))
    one = steps.constant("one", 1, np.float32)
    less = steps.append("divisor", "Max", steps.append("less", "Sub", count, one), one)
    unbiased = steps.append("unbiased", "Mul", variance, steps.append("excess", "Div", count, less))
    floored = steps.append("floored", "Max", steps.node.input[4], steps.constant("zero", 0, np.float32))
    flat, kept_share, new_share = (
        steps.constant(name, value, dtype)
        for name, value, dtype in (("flat", [-1], np.int64), ("kept", kept, np.float32), ("new", 1 - kept, np.float32))
    )
    for number, (old, batch) in enumerate(((steps.node.input[3], mean), (floored, unbiased)), 1):
        taken = steps.append(f"taken{number}", "Mul", steps.append(f"flat{number}", "Reshape", batch, flat), new_share)
        left = steps.append(f"left{number}", "Mul", old, kept_share)
        if number < len(steps.node.output):
            steps.define(steps.node.output[number], "Add", left, taken)


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in (*graph.input, *graph.value_info)}
    return ranks | {tensor.name: len(tensor.dims) for tensor in graph.initializer}
