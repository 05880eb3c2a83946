"""Gradients of elementwise functions, and of softmax."""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto, TensorProto

from export.gradients.builder import Graph, attributes
from export.gradients.rules import Gradients, elementwise, rule

_LARGEST = float(np.finfo(np.float32).max)  # 4 when multiplied by the smallest normal number


@elementwise("Identity")
def identity(graph: Graph, node: NodeProto, gradient: str) -> str:
    return gradient


@rule("Cast")
def cast(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient of a Cast of float32 to itself: a backward pass in two dtypes is more than is needed."""
    before, after = graph.dtype(node.input[0]), graph.dtype(node.output[0])
    if not before == after == np.float32:
        raise NotImplementedError(f"a Cast of {before} to {after}")
    return [gradients[0]]


@elementwise("Neg")
def neg(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Neg", gradient)


@elementwise("Abs")
def abs_(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Mul", gradient, graph.op("Sign", node.input[0]))


@elementwise("Exp")
def exp(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Mul", gradient, node.output[0])


@elementwise("Log")
def log(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Div", gradient, node.input[0])


@elementwise("Sqrt")
def sqrt(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Div", graph.op("Mul", gradient, graph.scalar(0.5)), node.output[0])


@elementwise("Reciprocal")
def reciprocal(graph: Graph, node: NodeProto, gradient: str) -> str:
    square = graph.op("Mul", node.output[0], node.output[0])
    return graph.op("Neg", graph.op("Mul", gradient, square))


@rule("Sign", "Floor", "Ceil", "Round", "Hardmax")
def steps(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient zero, as in torch."""
    assert gradients[0] is not None
    return [graph.op("Mul", gradients[0], graph.scalar(0.0))]


@elementwise("Sin")
def sin(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Mul", gradient, graph.op("Cos", node.input[0]))


@elementwise("Cos")
def cos(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Neg", graph.op("Mul", gradient, graph.op("Sin", node.input[0])))


@elementwise("Tanh")
def tanh(graph: Graph, node: NodeProto, gradient: str) -> str:
    square = graph.op("Mul", node.output[0], node.output[0])
    return graph.op("Mul", gradient, graph.op("Sub", graph.scalar(1.0), square))


@elementwise("Sigmoid")
def sigmoid(graph: Graph, node: NodeProto, gradient: str) -> str:
    slope = graph.op("Mul", node.output[0], graph.op("Sub", graph.scalar(1.0), node.output[0]))
    return graph.op("Mul", gradient, slope)


@elementwise("Erf")
def erf(graph: Graph, node: NodeProto, gradient: str) -> str:
    bell = graph.op("Exp", graph.op("Neg", graph.op("Mul", node.input[0], node.input[0])))
    return graph.op("Mul", gradient, graph.op("Mul", bell, graph.scalar(2 / math.sqrt(math.pi))))


@elementwise("Relu")
def relu(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Mul", gradient, positive(graph, node.output[0]))


@elementwise("LeakyRelu")
def leaky_relu(graph: Graph, node: NodeProto, gradient: str) -> str:
    slope = attributes(node).get("alpha", 0.01)
    above = graph.op("Mul", positive(graph, node.input[0]), graph.scalar(1 - slope))
    factor = graph.op("Add", above, graph.scalar(slope))
    return graph.op("Mul", gradient, factor)


@rule("PRelu")
def prelu(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient g where x > 0, else g · slope; for the slope, Σ g min(x, 0)."""
    (gradient,), (x, slope) = gradients, node.input
    assert gradient is not None
    grad_x = grad_slope = None
    if x in graph.wanted:
        above = graph.op("Greater", x, graph.scalar(0.0))
        grad_x = graph.op("Where", above, gradient, graph.op("Mul", gradient, slope))
    if slope in graph.wanted:
        product = graph.op("Mul", gradient, graph.op("Min", x, graph.scalar(0.0)))
        grad_slope = graph.sum_to(product, graph.shape(x), graph.shape(slope))
    return [grad_x, grad_slope]


@rule("Clip")
def clip(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient g within the bounds and on them, as in torch."""
    (gradient,) = gradients
    assert gradient is not None
    for sign, bound in zip((1, -1), node.input[1:], strict=False):
        if bound:
            gradient = graph.op("Mul", gradient, _within(graph, node.input[0], bound, sign))
    return [gradient, None, None]


@elementwise("Softmax")
def softmax(graph: Graph, node: NodeProto, gradient: str) -> str:
    """Gradient y (g - Σ g y)."""
    axis = attributes(node).get("axis", -1)
    weighted = graph.op("Mul", gradient, node.output[0])
    total = graph.sum(weighted, [axis], keepdims=True)
    return graph.op("Sub", weighted, graph.op("Mul", node.output[0], total))


@elementwise("LogSoftmax")
def log_softmax(graph: Graph, node: NodeProto, gradient: str) -> str:
    """Gradient g - exp(y) Σ g."""
    total = graph.sum(gradient, [attributes(node).get("axis", -1)], keepdims=True)
    return graph.op("Sub", gradient, graph.op("Mul", graph.op("Exp", node.output[0]), total))


def positive(graph: Graph, x: str) -> str:
    """Indicator of x > 0, float32: min(largest · x, 1) in one pass; a comparison and a Cast take two."""
    return graph.op("HardSigmoid", x, alpha=_LARGEST, beta=0.0)


def _within(graph: Graph, x: str, bound: str, sign: int) -> str:
    """Indicator of x >= bound, or with sign -1 of x <= bound, float32.

    For a constant bound, it is min(max(1 + sign · (x - bound) / step, 0), 1) with the distance to the nearest number
    beyond the bound as the step, a power of two, so that nothing is rounded near the bound.
    """
    found = graph.constant(bound)
    limit = np.float32(np.nan if found is None else found.reshape(()))
    step = abs(float(np.nextafter(limit, np.float32(-sign * np.inf))) - float(limit))
    if not (math.isfinite(step) and 1 / step <= _LARGEST):
        holds = graph.op("GreaterOrEqual" if sign > 0 else "LessOrEqual", x, bound)
        return graph.op("Cast", holds, to=TensorProto.FLOAT)
    return graph.op("HardSigmoid", x, alpha=sign / step, beta=1 - sign * float(limit) / step)
