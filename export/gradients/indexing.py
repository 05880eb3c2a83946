"""Gradients of operators that take or put entries by index: gathering, scattering, and TopK.

The gradient of an entry goes back to where the entry was taken from; if it was taken several times, the gradients add
up. All additions are done by ScatterElements, as onnxruntime's ScatterND adds from several threads at once.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from export.forward.tracing import Batch
from export.gradients.builder import Graph, attributes, static
from export.gradients.rules import Gradients, rule
from export.gradients.shaping import put_back


@rule("Gather")
def gather(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,), (table, indices) = gradients, node.input
    assert gradient is not None
    rank = len(graph.shape(table))
    axis = attributes(node).get("axis", 0) % rank
    size, positions = graph.shape(table)[axis], graph.constant(indices)
    if positions is not None and positions.ndim < 2 and not isinstance(size, Batch):
        distinct = np.atleast_1d(positions) % size
        if len(np.unique(distinct)) == len(distinct):
            lifted = graph.op("Unsqueeze", gradient, graph.ints(axis)) if positions.ndim == 0 else gradient
            return [put_back(graph, lifted, axis, distinct, graph.shape(table)), None]
    return [_add_along(graph, table, axis, indices, gradient), None]


@rule("GatherElements")
def gather_elements(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,), (data, indices) = gradients, node.input
    assert gradient is not None
    return [_add(graph, graph.zeros_like(data), indices, gradient, attributes(node).get("axis", 0)), None]


@rule("GatherND")
def gather_nd(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient for indices [..., Q], as if the first Q axes of the data were one."""
    (gradient,), (data, indices) = gradients, node.input
    assert gradient is not None
    if attributes(node).get("batch_dims", 0):
        raise NotImplementedError("a GatherND with batch dimensions")
    (depth,) = static(graph.shape(indices)[-1:], "indices of a GatherND")
    sizes = graph.op("Shape", data, start=0, end=depth)
    strides = [graph.op("ReduceProd", graph.op("Shape", data, start=n, end=depth)) for n in range(depth)]
    counts = graph.op("Concat", *strides[1:], graph.ints(1), axis=0)
    places = graph.op("Mul", graph.op("Mod", indices, sizes), counts)  # negative ones count from the end
    rows = graph.op("ReduceSum", places, graph.ints(-1), keepdims=0)
    rest = graph.op("Shape", data, start=depth)
    flat = graph.op("Reshape", data, graph.op("Concat", strides[0], rest, axis=0))
    graph.set_shape(flat, (0, *graph.shape(data)[depth:]))
    return [graph.op("Reshape", _add_along(graph, flat, 0, rows, gradient), graph.op("Shape", data)), None]


@rule("TopK")
def top_k(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    gradient, (values, indices) = gradients[0], (node.input[0], node.output[1])
    assert gradient is not None
    return [_add(graph, graph.zeros_like(values), indices, gradient, attributes(node).get("axis", -1)), None]


@rule("ScatterElements", "ScatterND")
def scatter(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradients of a scatter: entries that were put get theirs from where they are, entries that they replaced none."""
    (gradient,), (_, indices, updates) = gradients, node.input
    assert gradient is not None
    given = attributes(node)
    axis = {"axis": given.get("axis", 0)} if node.op_type == "ScatterElements" else {}
    reduction = given.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise NotImplementedError(f"a {node.op_type} with reduction {reduction}")
    grad_data = gradient
    if reduction == "none":
        grad_data = graph.op(node.op_type, gradient, indices, graph.zeros_like(updates), **axis)
    taking = node.op_type.replace("Scatter", "Gather")
    return [grad_data, None, graph.op(taking, gradient, indices, **axis)]


def _add_along(graph: Graph, table: str, axis: int, indices: str, gradient: str) -> str:
    """Gradient of a table from which whole slices along an axis were taken."""
    rank = len(graph.shape(table))
    before, after = graph.op("Shape", table, start=0, end=axis), graph.op("Shape", table, start=axis + 1)
    count = graph.op("Reshape", graph.op("Size", indices), graph.ints(1))
    shape = graph.op("Concat", before, count, after, axis=0)
    column = graph.op("Reshape", indices, graph.ints(-1, *[1] * (rank - axis - 1)))
    spread = graph.op("Expand", column, shape)
    return _add(graph, graph.zeros_like(table), spread, graph.op("Reshape", gradient, shape), axis)


def _add(graph: Graph, base: str, indices: str, gradient: str, axis: int) -> str:
    return graph.op("ScatterElements", base, indices, gradient, axis=axis, reduction="add")
