"""Gradients of trigonometric and hyperbolic functions, and of activations that torch.onnx seldom writes."""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from export.gradients.builder import Graph, attributes
from export.gradients.rules import elementwise


@elementwise("Tan")
def tan(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g (1 + y²)."""
    return graph.op("Mul", gradient, _plus(graph, _square(graph, node.output[0]), 1.0))


@elementwise("Atan")
def atan(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g / (1 + x²)."""
    return graph.op("Div", gradient, _plus(graph, _square(graph, node.input[0]), 1.0))


@elementwise("Atanh")
def atanh(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g / (1 - x²)."""
    return graph.op("Div", gradient, _minus_square(graph, node.input[0]))


@elementwise("Asin")
def asin(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g / √(1 - x²)."""
    return graph.op("Div", gradient, graph.op("Sqrt", _minus_square(graph, node.input[0])))


@elementwise("Acos")
def acos(graph: Graph, node: NodeProto, gradient: str) -> str:
    """-g / √(1 - x²)."""
    return graph.op("Div", graph.op("Neg", gradient), graph.op("Sqrt", _minus_square(graph, node.input[0])))


@elementwise("Asinh")
def asinh(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g / √(x² + 1)."""
    return graph.op("Div", gradient, graph.op("Sqrt", _plus(graph, _square(graph, node.input[0]), 1.0)))


@elementwise("Acosh")
def acosh(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g / √(x² - 1)."""
    return graph.op("Div", gradient, graph.op("Sqrt", _plus(graph, _square(graph, node.input[0]), -1.0)))


@elementwise("Sinh")
def sinh(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Mul", gradient, graph.op("Cosh", node.input[0]))


@elementwise("Cosh")
def cosh(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Mul", gradient, graph.op("Sinh", node.input[0]))


@elementwise("Softsign")
def softsign(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g / (1 + |x|)²."""
    return graph.op("Div", gradient, _square(graph, _plus(graph, graph.op("Abs", node.input[0]), 1.0)))


@elementwise("Softplus")
def softplus(graph: Graph, node: NodeProto, gradient: str) -> str:
    return graph.op("Mul", gradient, graph.op("Sigmoid", node.input[0]))


@elementwise("Mish")
def mish(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g (t + x sigmoid(x) (1 - t²)), with t = tanh(softplus(x))."""
    x = node.input[0]
    t = graph.op("Tanh", graph.op("Softplus", x))
    curve = graph.op("Mul", graph.op("Mul", x, graph.op("Sigmoid", x)), _minus_square(graph, t))
    return graph.op("Mul", gradient, graph.op("Add", t, curve))


@elementwise("Elu")
def elu(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g where x > 0, else g (y + α)."""
    alpha = attributes(node).get("alpha", 1.0)
    return _above_zero(graph, node, gradient, 1.0, _plus(graph, node.output[0], alpha))


@elementwise("Selu")
def selu(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g γ where x > 0, else g (y + γ α)."""
    given = {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875, **attributes(node)}
    negative = _plus(graph, node.output[0], given["gamma"] * given["alpha"])
    return _above_zero(graph, node, gradient, given["gamma"], negative)


@elementwise("Celu")
def celu(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g where x > 0, else g (y / α + 1)."""
    alpha = attributes(node).get("alpha", 1.0)
    negative = _plus(graph, graph.op("Div", node.output[0], graph.scalar(alpha)), 1.0)
    return _above_zero(graph, node, gradient, 1.0, negative)


@elementwise("HardSigmoid")
def hard_sigmoid(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g α where 0 < y < 1."""
    y, slope = node.output[0], graph.scalar(attributes(node).get("alpha", 0.2))
    inside = graph.op("And", graph.op("Greater", y, graph.scalar(0.0)), graph.op("Less", y, graph.scalar(1.0)))
    return graph.op("Mul", gradient, graph.op("Where", inside, slope, graph.scalar(0.0)))


@elementwise("HardSwish")
def hard_swish(graph: Graph, node: NodeProto, gradient: str) -> str:
    """g (x / 3 + 1/2) where |x| < 3, else g for positive x."""
    x = node.input[0]
    slope = _plus(graph, graph.op("Div", x, graph.scalar(3.0)), 0.5)
    inside = graph.op("Less", graph.op("Abs", x), graph.scalar(3.0))
    outside = graph.op("Cast", graph.op("Greater", x, graph.scalar(0.0)), to=TensorProto.FLOAT)
    return graph.op("Mul", gradient, graph.op("Where", inside, slope, outside))


@elementwise("ThresholdedRelu")
def thresholded_relu(graph: Graph, node: NodeProto, gradient: str) -> str:
    above = graph.op("Greater", node.input[0], graph.scalar(attributes(node).get("alpha", 1.0)))
    return graph.op("Mul", gradient, graph.op("Cast", above, to=TensorProto.FLOAT))


@elementwise("Shrink")
def shrink(graph: Graph, node: NodeProto, gradient: str) -> str:
    outside = graph.op("Greater", graph.op("Abs", node.input[0]), graph.scalar(attributes(node).get("lambd", 0.5)))
    return graph.op("Mul", gradient, graph.op("Cast", outside, to=TensorProto.FLOAT))


def _square(graph: Graph, value: str) -> str:
    return graph.op("Mul", value, value)


def _plus(graph: Graph, value: str, number: float) -> str:
    return graph.op("Add", value, graph.scalar(number))


def _minus_square(graph: Graph, value: str) -> str:
    """1 - value²."""
    return graph.op("Sub", graph.scalar(1.0), _square(graph, value))


def _above_zero(graph: Graph, node: NodeProto, gradient: str, positive: float, negative: str) -> str:
    """Gradient times one slope where x > 0 and another elsewhere."""
    above = graph.op("Greater", node.input[0], graph.scalar(0.0))
    return graph.op("Mul", gradient, graph.op("Where", above, graph.scalar(positive), negative))
