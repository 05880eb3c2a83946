"""Gradients of arithmetic with broadcasting, and of choices between values."""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from export.gradients.builder import Graph
from export.gradients.rules import Gradients, rule


@rule("Add", "Sum")
def add(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    return [_summed(graph, node, gradients[0], name) for name in node.input]


@rule("Mean")
def mean(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    assert gradients[0] is not None
    share = graph.op("Mul", gradients[0], graph.scalar(1 / len(node.input)))
    return [_summed(graph, node, share, name) for name in node.input]


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


def _summed(graph: Graph, node: NodeProto, gradient: str | None, name: str) -> str | None:
    """Gradient of an input that may have been broadcast to the output."""
    if gradient is None or name not in graph.wanted:
        return None
    return graph.sum_to(gradient, graph.shape(node.output[0]), graph.shape(name))
