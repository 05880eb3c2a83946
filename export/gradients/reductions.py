"""Gradients of reductions over axes (sums, means, norms, products and extrema) and of cumulative sums."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from export.forward.tracing import Batch
from export.gradients.builder import Graph, attributes
from export.gradients.rules import Gradients, rule

_TINY = float(np.finfo(np.float32).tiny)


@rule("ReduceSum", "ReduceMean")
def reduce(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    shape, listed = graph.shape(node.input[0]), reduced_axes(graph, node)
    gradient = _gradient(graph, node, gradients)
    if node.op_type == "ReduceMean":
        static = [dim for axis in listed if isinstance(dim := shape[axis], int)]
        gradient = graph.op("Mul", gradient, graph.scalar(1 / float(np.prod(static))))
        for axis in listed:
            if isinstance(shape[axis], Batch):
                size = graph.op("Shape", node.input[0], start=axis, end=axis + 1)
                gradient = graph.op("Div", gradient, graph.op("Cast", size, to=TensorProto.FLOAT))
    return [graph.op("Expand", gradient, graph.op("Shape", node.input[0]))]


@rule("ReduceL1", "ReduceSumSquare", "ReduceLogSum")
def reduce_by_entry(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradients g sign(x), 2 g x and g / Σ x."""
    gradient, x = _gradient(graph, node, gradients), node.input[0]
    if node.op_type == "ReduceL1":
        return [graph.op("Mul", gradient, graph.op("Sign", x))]
    if node.op_type == "ReduceSumSquare":
        return [graph.op("Mul", graph.op("Mul", gradient, graph.scalar(2.0)), x)]
    total = graph.sum(x, reduced_axes(graph, node), keepdims=True)
    return [graph.op("Expand", graph.op("Div", gradient, total), graph.op("Shape", x))]


@rule("ReduceL2", "ReduceLogSumExp")
def reduce_curved(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradients g x / |x|, zero for x = 0, and g exp(x - y)."""
    gradient, x = _gradient(graph, node, gradients), node.input[0]
    y = _with_reduced_axes(graph, node, node.output[0])
    if node.op_type == "ReduceL2":
        return [graph.op("Mul", x, graph.op("Div", gradient, graph.op("Max", y, graph.scalar(_TINY))))]
    return [graph.op("Mul", gradient, graph.op("Exp", graph.op("Sub", x, y)))]


@rule("ReduceMax", "ReduceMin")
def reduce_extremum(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient in equal parts to the entries that attain the extremum, as in torch's amax and amin."""
    gradient, x = _gradient(graph, node, gradients), node.input[0]
    y = _with_reduced_axes(graph, node, node.output[0])
    attains = graph.op("Cast", graph.op("Equal", x, y), to=TensorProto.FLOAT)
    count = graph.sum(attains, reduced_axes(graph, node), keepdims=True)
    return [graph.op("Mul", attains, graph.op("Div", gradient, count))]


@rule("ReduceProd")
def reduce_product(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient g times the product of the other entries, which is zero if any of them is."""
    gradient, x = _gradient(graph, node, gradients), node.input[0]
    zero = graph.op("Equal", x, graph.scalar(0.0))
    factors = graph.op("Where", zero, graph.scalar(1.0), x)
    axes = graph.ints(*reduced_axes(graph, node))
    product = graph.op("ReduceProd", factors, axes, keepdims=1)
    zeros = graph.op("Cast", zero, to=TensorProto.FLOAT)
    others = graph.op("Sub", graph.op("ReduceSum", zeros, axes, keepdims=1), zeros)
    no_other = graph.op("Cast", graph.op("Equal", others, graph.scalar(0.0)), to=TensorProto.FLOAT)
    return [graph.op("Mul", graph.op("Div", graph.op("Mul", gradient, product), factors), no_other)]


@rule("CumSum")
def cumulative_sum(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient as the cumulative sum in the opposite direction."""
    assert gradients[0] is not None
    given = attributes(node)
    opposite = {"reverse": 1 - given.get("reverse", 0), "exclusive": given.get("exclusive", 0)}
    return [graph.op("CumSum", gradients[0], node.input[1], **opposite), None]


def reduced_axes(graph: Graph, node: NodeProto) -> list[int]:
    """Axes that a reduction removes, none of them negative.

    Raises:
        NotImplementedError: They are not constant.
    """
    rank = len(graph.shape(node.input[0]))
    given = graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else np.array([])
    if given is None:
        raise NotImplementedError(f"a {node.op_type} over axes that are not constant")
    everything = range(0 if attributes(node).get("noop_with_empty_axes", 0) else rank)
    return [int(axis) % rank for axis in np.ravel(given)] or list(everything)


def _gradient(graph: Graph, node: NodeProto, gradients: Gradients) -> str:
    """Gradient of the output, with the reduced axes put back."""
    assert gradients[0] is not None
    return _with_reduced_axes(graph, node, gradients[0])


def _with_reduced_axes(graph: Graph, node: NodeProto, value: str) -> str:
    """Value of the output's shape with the reduced axes put back, of size 1."""
    listed = reduced_axes(graph, node)
    if attributes(node).get("keepdims", 1) or not listed:
        return value
    return graph.op("Unsqueeze", value, graph.ints(*listed))
