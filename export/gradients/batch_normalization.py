"""Batch normalization, its gradients and its running statistics, lowered to the fewest passes over the activations.

With x as [N, C, pixels], c = x - mean and y = c · inverse, where mean and variance are those of a channel over the
whole batch: means over the pixels first, which are contiguous and fast, then over the examples.
"""

from __future__ import annotations

from math import prod

from onnx import NodeProto, TensorProto

from export.gradients.builder import Graph, attributes
from export.gradients.channelwise import scale_and_shift
from export.gradients.normalization import is_constant
from export.gradients.rules import Gradients, rule


def forward(graph: Graph, node: NodeProto) -> None:
    """Append a BatchNormalization in training mode, with its output under the same name."""
    (x, scale, shift), y = node.input[:3], node.output[0]
    if not attributes(node).get("training_mode", 0):
        raise NotImplementedError("a BatchNormalization by running statistics")
    flat = _by_channel(graph, x, x)
    mean = _mean(graph, flat)
    centred = graph.define(f"{y}.centred", "Sub", flat, _column(graph, mean))
    variance = graph.define(f"{y}.variance", "Identity", _mean(graph, graph.op("Mul", centred, centred)))
    raised = graph.op("Add", variance, graph.scalar(attributes(node).get("epsilon", 1e-5)))
    inverse = graph.define(f"{y}.inverse", "Reciprocal", graph.op("Sqrt", raised))
    slope = inverse if is_constant(graph, scale, 1) else graph.op("Mul", inverse, scale)
    slope = graph.define(f"{y}.slope", "Identity", slope)
    result = scale_and_shift(graph, centred, slope, "" if is_constant(graph, shift, 0) else shift)
    graph.define(y, "Reshape", result, graph.ints(-1, *_static(graph, x)))
    if graph.constant(node.input[3]) is None:
        _append_statistics(graph, node, mean, variance)


def _append_statistics(graph: Graph, node: NodeProto, mean: str, variance: str) -> None:
    """Append the running statistics after the batch, of which the variance has a divisor of one less, if that is not 0.

    A lossy codec may have left a variance below zero, which counts as zero.
    """
    kept = attributes(node).get("momentum", 0.9)
    count = values_per_channel(graph, node.input[0])
    one_less = graph.op("Max", graph.op("Sub", count, graph.scalar(1.0)), graph.scalar(1.0))
    unbiased = graph.op("Mul", variance, graph.op("Div", count, one_less))
    pairs = ((node.input[3], mean), (_not_negative(graph, node.input[4]), unbiased))
    for (old, new), name in zip(pairs, node.output[1:], strict=True):
        share = graph.op("Mul", new, graph.scalar(1 - kept))
        graph.define(name, "Add", graph.op("Mul", old, graph.scalar(kept)), share)


def evaluate(graph: Graph, node: NodeProto) -> None:
    """Append a BatchNormalization by its running statistics; by those of the batch if it has none."""
    if graph.constant(node.input[3]) is not None:
        forward(graph, node)
        return
    x, scale, shift, mean, variance = node.input
    raised = graph.op("Add", _not_negative(graph, variance), graph.scalar(attributes(node).get("epsilon", 1e-5)))
    slope = graph.op("Mul", scale, graph.op("Reciprocal", graph.op("Sqrt", raised)))
    offset = graph.op("Sub", shift, graph.op("Mul", mean, slope))
    by_channel = graph.ints(-1, *[1] * (len(graph.shape(x)) - 2))
    slope, offset = (graph.op("Reshape", value, by_channel) for value in (slope, offset))
    graph.define(node.output[0], "Add", graph.op("Mul", x, slope), offset)


@rule("BatchNormalization")
def batch_normalization(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient of x: (g - mean(g) - c · inverse² mean(g c)) · slope."""
    gradient, (x, scale, shift), y = gradients[0], node.input[:3], node.output[0]
    assert gradient is not None
    g, c, inverse = _by_channel(graph, gradient, x), f"{y}.centred", f"{y}.inverse"
    drift, share = _mean(graph, g), _mean(graph, graph.op("Mul", g, c))
    grad_x = grad_scale = grad_shift = None
    if scale in graph.wanted or shift in graph.wanted:
        count = values_per_channel(graph, x)
        grad_shift = graph.op("Mul", drift, count)
        grad_scale = graph.op("Mul", graph.op("Mul", share, inverse), count)
    if x in graph.wanted:
        slope = f"{y}.slope"
        opposite = graph.op("Neg", slope)
        pull = graph.op("Mul", graph.op("Mul", share, graph.op("Mul", inverse, inverse)), opposite)
        rest = scale_and_shift(graph, c, pull, graph.op("Mul", drift, opposite))
        grad_x = graph.reshape_like(graph.op("Add", scale_and_shift(graph, g, slope, ""), rest), x)
    return [grad_x, grad_scale, grad_shift]


def _static(graph: Graph, x: str) -> list[int]:
    return graph.sizes(x, "channels or pixels of a BatchNormalization")


def _not_negative(graph: Graph, value: str) -> str:
    return graph.op("Max", value, graph.scalar(0.0))


def values_per_channel(graph: Graph, x: str) -> str:
    """Number of values of a channel in the batch, float32 []."""
    channels = _static(graph, x)[0]
    size = graph.op("Cast", graph.op("Size", x), to=TensorProto.FLOAT)
    return graph.op("Mul", size, graph.scalar(1 / channels))


def _by_channel(graph: Graph, value: str, like: str) -> str:
    """A value in the shape of `like` as [N, C, pixels]."""
    channels, *pixels = _static(graph, like)
    return graph.op("Reshape", value, graph.ints(-1, channels, prod(pixels)))


def _mean(graph: Graph, value: str) -> str:
    """Mean [C] of a value [N, C, pixels]."""
    of_examples = graph.op("ReduceMean", value, graph.ints(2), keepdims=0)
    return graph.op("ReduceMean", of_examples, graph.ints(0), keepdims=0)


def _column(graph: Graph, value: str) -> str:
    return graph.op("Unsqueeze", value, graph.ints(1))
