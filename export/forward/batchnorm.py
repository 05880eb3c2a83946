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
from onnx import NodeProto, helper, numpy_helper
from onnxscript import opset18 as op

OPERATOR = "BatchNormalization"


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
            _append_steps(plain.graph, node, ranks[node.input[0]])
        else:
            plain.graph.node.append(node)
    return plain


def _append_steps(graph: onnx.GraphProto, node: NodeProto, rank: int) -> None:
    x, scale, shift = node.input[:3]
    y = node.output[0]
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)

    def constant(name: str, values: Any, dtype: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), f"{y}.{name}"))
        return f"{y}.{name}"

    def append(operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        output = f"{y}.{name}" if name else y
        graph.node.append(
            helper.make_node(
                operator, list(inputs), [output], name=f"{node.name}.{name}" if name else node.name, **attributes
            )
        )
        return output

    axes = constant("axes", [0, *range(2, rank)], np.int64)
    channels = constant("channels", [-1, *[1] * (rank - 2)], np.int64)
    centred = append("Sub", x, append("ReduceMean", x, axes, name="mean"), name="centred")
    square = append("Mul", centred, centred, name="square")
    variance = append("ReduceMean", square, axes, name="variance")
    raised = append("Add", variance, constant("epsilon", epsilon, np.float32), name="raised")
    normal = append("Div", centred, append("Sqrt", raised, name="deviation"), name="normal")
    scaled = append("Mul", normal, append("Reshape", scale, channels, name="scale"), name="scaled")
    append("Add", scaled, append("Reshape", shift, channels, name="shift"), name="")


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {info.name: len(info.type.tensor_type.shape.dim) for info in (*graph.input, *graph.value_info)}
