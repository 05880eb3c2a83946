"""Gradients of arithmetic with broadcasting, of choices between two values, and of sums and means."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from export.gradients.graph import Graph, attributes
from export.gradients.rules import Gradients, rule
from export.tracing import Batch

_TINY = float(np.finfo(np.float32).tiny)


@rule("Add", "Sum")
def add(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    return [_summed(graph, node, gradients[0], name) for name in node.input]


@rule("Sub")
def sub(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    left = _summed(graph, node, gradients[0], node.input[0])
    right = _summed(graph, node, gradients[0], node.input[1])
    return [left, None if right is None else graph.op("Neg", right)]


@rule("Mul")
def mul(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    result: list[str | None] = []
    for name, other in (node.input, node.input[::-1]):
        product = graph.op("Mul", gradient, other) if name in graph.wanted else None
        result.append(_summed(graph, node, product, name))
    return result


@rule("Div")
def div(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,), (left, right) = gradients, node.input
    assert gradient is not None
    quotient = graph.op("Div", gradient, right)
    below = None
    if right in graph.wanted:
        below = graph.op("Neg", graph.op("Mul", quotient, node.output[0]))
    return [_summed(graph, node, quotient, left), _summed(graph, node, below, right)]


@rule("Pow")
def pow_(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Of the base only, with a constant exponent."""
    (gradient,), (base, exponent) = gradients, node.input
    assert gradient is not None
    power = graph.constant(exponent)
    if power is None or power.size != 1:
        raise NotImplementedError("an exponent that is no constant number")
    value = float(power.reshape(()))
    slope = base if value == 2 else graph.op("Pow", base, graph.scalar(value - 1))
    return [graph.op("Mul", gradient, graph.op("Mul", slope, graph.scalar(value))), None]


@rule("Min", "Max")
def extremum(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Half to each where two values are equal, as in torch."""
    (gradient,), (left, right) = gradients, node.input
    assert gradient is not None
    wins = "Greater" if node.op_type == "Max" else "Less"
    share = graph.op("Cast", graph.op(wins, left, right), to=TensorProto.FLOAT)
    tie = graph.op("Cast", graph.op("Equal", left, right), to=TensorProto.FLOAT)
    share = graph.op("Add", share, graph.op("Mul", tie, graph.scalar(0.5)))
    of_left = graph.op("Mul", gradient, share)
    of_right = graph.op("Sub", gradient, of_left)
    return [_summed(graph, node, of_left, left), _summed(graph, node, of_right, right)]


@rule("Where")
def where(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,), (condition, left, right) = gradients, node.input
    assert gradient is not None
    of_left = graph.op("Mul", gradient, graph.op("Cast", condition, to=TensorProto.FLOAT))
    of_right = graph.op("Sub", gradient, of_left)
    return [None, _summed(graph, node, of_left, left), _summed(graph, node, of_right, right)]


@rule("ReduceL2", "ReduceLogSumExp")
def reduce_curved(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """g x / |x|, zero for x = 0; g exp(x - y)."""
    (gradient,), x, y = gradients, node.input[0], node.output[0]
    assert gradient is not None
    if not attributes(node).get("keepdims", 1):
        gradient, y = (_with_reduced_axes(graph, node, value) for value in (gradient, y))
    if node.op_type == "ReduceL2":
        return [graph.op("Mul", x, graph.op("Div", gradient, graph.op("Max", y, graph.scalar(_TINY))))]
    return [graph.op("Mul", gradient, graph.op("Exp", graph.op("Sub", x, y)))]


@rule("ReduceSum", "ReduceMean")
def reduce(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    shape, listed = graph.shape(node.input[0]), _reduced_axes(graph, node)
    if not attributes(node).get("keepdims", 1):
        gradient = _with_reduced_axes(graph, node, gradient)
    if node.op_type == "ReduceMean":
        static = [dim for axis in listed if isinstance(dim := shape[axis], int)]
        gradient = graph.op("Mul", gradient, graph.scalar(1 / float(np.prod(static))))
        for axis in listed:
            if isinstance(shape[axis], Batch):
                size = graph.op("Shape", node.input[0], start=axis, end=axis + 1)
                gradient = graph.op("Div", gradient, graph.op("Cast", size, to=TensorProto.FLOAT))
    return [graph.op("Expand", gradient, graph.op("Shape", node.input[0]))]


def _reduced_axes(graph: Graph, node: NodeProto) -> list[int]:
    rank = len(graph.shape(node.input[0]))
    given = graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    return list(range(rank)) if given is None else [int(axis) % rank for axis in np.ravel(given)]


def _with_reduced_axes(graph: Graph, node: NodeProto, value: str) -> str:
    """A value of the output's shape with the axes that were reduced, of size 1."""
    listed, shape = _reduced_axes(graph, node), graph.shape(node.input[0])
    return graph.reshape(value, [1 if axis in listed else dim for axis, dim in enumerate(shape)])


def _summed(graph: Graph, node: NodeProto, gradient: str | None, name: str) -> str | None:
    """The gradient of an input that may have been broadcast to the output."""
    if gradient is None or name not in graph.wanted:
        return None
    return graph.sum_to(gradient, graph.shape(node.output[0]), graph.shape(name))
