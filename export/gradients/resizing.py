"""Gradient of resizing, which is linear along each axis: y = M x, so that the gradient is Mᵀ g.

M [new size, size] is found by resizing the identity matrix along one axis, in onnxruntime and with the node's options.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.gradients.builder import Graph, attributes
from export.gradients.rules import Gradients, rule

_PER_AXIS = ("axes", "keep_aspect_ratio_policy")
_OPSET, _IR_VERSION = 18, 10


@rule("Resize")
def resize(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    gradient, x = gradients[0], node.input[0]
    assert gradient is not None
    given = attributes(node)
    if given.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise NotImplementedError("a Resize of a region")
    what = "channels or pixels of a Resize"
    before, after = (graph.sizes(value, what) for value in (x, node.output[0]))
    scales = _scales(graph, node)
    last = len(before)
    for axis, (size, resized) in enumerate(zip(before, after, strict=True), 1):
        scale = None if scales is None else float(scales[axis])
        if size == resized and scale in (None, 1):
            continue
        matrix = _matrix(given, size, resized, scale)
        if axis == last:
            gradient = graph.op("MatMul", gradient, graph.array(matrix))
            continue
        perm = [*range(axis), *range(axis + 1, last + 1), axis]
        moved = graph.op("MatMul", graph.transpose(gradient, perm), graph.array(matrix))
        gradient = graph.transpose(moved, [int(n) for n in np.argsort(perm)])
    return [gradient]


def _scales(graph: Graph, node: NodeProto) -> NDArray[Any] | None:
    """Scales of all axes; None where the sizes are given instead."""
    name = node.input[2] if len(node.input) > 2 else ""
    scales = graph.constant(name) if name else None
    if scales is None or not scales.size:
        if name and scales is None:
            raise NotImplementedError("a Resize whose scales are not constant")
        return None
    full = np.ones(len(graph.shape(node.input[0])))
    full[attributes(node).get("axes", slice(None))] = scales
    return full


def _matrix(given: dict[str, Any], size: int, resized: int, scale: float | None) -> NDArray[np.float32]:
    """Matrix M [resized, size] of one axis."""
    options = {name: value for name, value in given.items() if name not in _PER_AXIS}
    if scale is None:
        inputs, factors = ["unit", "", "", "factors"], np.array([size, resized])
    else:
        inputs, factors = ["unit", "", "factors"], np.array([1, scale], np.float32)
    unit, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, None]) for name in ("unit", "result"))
    made = helper.make_graph(
        [helper.make_node("Resize", inputs, ["result"], **options)],
        "resize",
        [unit],
        [result],
        [numpy_helper.from_array(factors, "factors")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"unit": np.eye(size, dtype=np.float32)})
    matrix: NDArray[np.float32] = np.ascontiguousarray(rows.T)
    return matrix
