"""Conversion of a folded model to float16."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.folding.inference import prune, replace


def to_float16(model: onnx.ModelProto, parameters: Collection[str]) -> onnx.ModelProto:
    """Make a model compute in float16 from the first parameter on; the preprocessing before it stays float32.

    Args:
        model: Model in float32, without subgraphs and Constant nodes.
        parameters: Names of the initializers that come from tensors of the layout.

    Returns:
        Model with float16 weights and the inputs and outputs of `model`.
    """
    halved = onnx.ModelProto()
    halved.CopyFrom(model)
    graph = halved.graph
    floats = _float_values(model)
    half = floats.intersection(parameters)
    reached = set(half)
    preprocessing, computing = [], []
    for node in graph.node:
        if reached.isdisjoint(node.input):
            preprocessing.append(node)
        else:
            computing.append(node)
            reached.update(node.output)
    half |= floats & reached
    entering = {name for node in computing for name in node.input} & floats - half
    outputs = half.intersection(info.name for info in graph.output)
    names = {name: f"{name}.float16" if name in entering | outputs else name for name in entering | half}
    for node in computing:
        _compute_in_half(node, names)
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name in names}
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in half])
    graph.initializer.extend(_half(tensor, names[name]) for name, tensor in constants.items())
    casts = [_cast(name, names[name], TensorProto.FLOAT16) for name in sorted(entering - constants.keys())]
    results = [_cast(names[name], name, TensorProto.FLOAT) for name in sorted(outputs)]
    replace(graph.node, [*preprocessing, *casts, *computing, *results])
    prune(graph)
    return halved


def _float_values(model: onnx.ModelProto) -> set[str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = (*graph.input, *graph.value_info, *graph.output)
    floats = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}


def _compute_in_half(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    replace(node.input, [names.get(name, name) for name in node.input])
    replace(node.output, [names.get(name, name) for name in node.output])
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.t.data_type == TensorProto.FLOAT:  # of ConstantOfShape
            attribute.t.CopyFrom(_half(attribute.t, attribute.t.name))


def _half(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    with np.errstate(over="ignore"):  # a value that is too large becomes infinite, which the outputs show
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name)


def _cast(source: str, target: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=dtype)
