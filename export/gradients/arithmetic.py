"""Gradients of arithmetic with broadcasting, of choices between two values, and of sums and means."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from export.forward.tracing import Batch
from export.gradients.builder import Graph, attributes
from export.gradients.rules import Gradients, rule

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
    """Gradients g e x^(e-1), zero for e = 0, and g x^e log(x), zero for x = 0 and e >= 0, as in torch."""
    (gradient,), (base, exponent), y = gradients, node.input, node.output[0]
    assert gradient is not None
    grad_base = grad_exponent = None
    if base in graph.wanted:
        grad_base = _summed(graph, node, graph.op("Mul", gradient, _slope_of_power(graph, base, exponent)), base)
    if exponent in graph.wanted:
        zero = graph.scalar(0.0)
        vanishes = graph.op("And", graph.op("Equal", base, zero), graph.op("GreaterOrEqual", exponent, zero))
        log = graph.op("Log", graph.op("Where", vanishes, graph.scalar(1.0), base))
        grad_exponent = _summed(graph, node, graph.op("Mul", gradient, graph.op("Mul", y, log)), exponent)
    return [grad_base, grad_exponent]


def _slope_of_power(graph: Graph, base: str, exponent: str) -> str:
    """Slope e x^(e-1) of a power by its base."""
    power = graph.constant(exponent)
    if power is not None and power.size == 1 and (value := float(power.reshape(()))):
        slope = base if value == 2 else graph.op("Pow", base, graph.scalar(value - 1))
        return graph.op("Mul", slope, graph.scalar(value))
    exponent = graph.op("Cast", exponent, to=TensorProto.FLOAT)
    less = graph.op("Sub", exponent, graph.scalar(1.0))
    flat = graph.op("Equal", exponent, graph.scalar(0.0))
    slope = graph.op("Pow", base, graph.op("Where", flat, graph.scalar(1.0), less))  # not 0 · inf
    return graph.op("Mul", slope, exponent)


@rule("Min", "Max")
def extremum(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient in equal parts to the inputs that attain the extremum, as in torch."""
    (gradient,), y = gradients, node.output[0]
    assert gradient is not None
    attains = [graph.op("Cast", graph.op("Equal", name, y), to=TensorProto.FLOAT) for name in node.input]
    share = graph.op("Div", gradient, graph.op("Sum", *attains))
    parts = [graph.op("Mul", share, attained) for attained in attains]
    return [_summed(graph, node, part, name) for part, name in zip(parts, node.input, strict=True)]


@rule("Where")
def where(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,), (condition, left, right) = gradients, node.input
    assert gradient is not None
    grad_left = graph.op("Mul", gradient, graph.op("Cast", condition, to=TensorProto.FLOAT))
    grad_right = graph.op("Sub", gradient, grad_left)
    return [None, _summed(graph, node, grad_left, left), _summed(graph, node, grad_right, right)]


@rule("ReduceL2", "ReduceLogSumExp")
def reduce_curved(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradients g x / |x|, zero for x = 0, and g exp(x - y)."""
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
    given = graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else np.array([])
    if given is None:
        raise NotImplementedError(f"a {node.op_type} over axes that are not constant")
    everything = range(0 if attributes(node).get("noop_with_empty_axes", 0) else rank)
    return [int(axis) % rank for axis in np.ravel(given)] or list(everything)


def _with_reduced_axes(graph: Graph, node: NodeProto, value: str) -> str:
    """Value of the output's shape with the reduced axes put back, of size 1."""
    listed = _reduced_axes(graph, node)
    return graph.op("Unsqueeze", value, graph.ints(*listed)) if listed else value


def _summed(graph: Graph, node: NodeProto, gradient: str | None, name: str) -> str | None:
    """Gradient of an input that may have been broadcast to the output."""
    if gradient is None or name not in graph.wanted:
        return None
    return graph.sum_to(gradient, graph.shape(node.output[0]), graph.shape(name))
