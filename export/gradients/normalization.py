"""Layer and group normalization and their gradients, lowered to the fewest passes over the activations.

Both subtract a mean, c = x - mean, and divide by a deviation, n = c · inverse. onnxruntime's own LayerNormalization is
slow in older releases and hides c, which the gradient needs; sums of squares are faster as a product and a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from onnx import NodeProto, helper

from export.forward.tracing import Batch
from export.gradients.builder import Graph, attributes
from export.gradients.channelwise import scale_and_shift
from export.gradients.rules import Gradients, rule

GROUP = "GroupNormalization"
"""Operator of the nodes that `fuse` makes: x [N, C, *S], scale and bias (or "") of C entries; groups and epsilon.

They exist only between the forward graph and its lowering."""


def forward(graph: Graph, node: NodeProto) -> None:
    """Append a LayerNormalization or `GROUP` node of the forward graph, with its output under the same name."""
    if node.op_type == GROUP:
        _forward_group(graph, node)
    elif len(node.output) > 1:
        raise NotImplementedError("a LayerNormalization whose mean or deviation is in use")
    else:
        _forward_layer(graph, node)


def _forward_layer(graph: Graph, node: NodeProto) -> None:
    (x, scale, *bias), y = node.input, node.output[0]
    centred = _normalize(graph, x, _normalized_axes(graph, node), attributes(node).get("epsilon", 1e-5), y)
    normal = graph.define(f"{y}.normal", "Mul", centred, f"{y}.inverse")
    scaled = normal if is_constant(graph, scale, 1) else graph.op("Mul", normal, scale)
    shifts = bias and bias[0] and not is_constant(graph, bias[0], 0)
    graph.define(y, *(("Add", scaled, bias[0]) if shifts else ("Identity", scaled)))


@rule("LayerNormalization")
def layer_normalization(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient of x: (g - mean(g) - n mean(g n)) · inverse, with g the output's gradient times scale."""
    gradient, (x, scale), y = gradients[0], node.input[:2], node.output[0]
    assert gradient is not None
    axes, shape = _normalized_axes(graph, node), graph.shape(x)
    normal, inverse = f"{y}.normal", f"{y}.inverse"
    weighted = graph.op("Mul", gradient, normal)
    grad_scale = graph.sum_to(weighted, shape, graph.shape(scale)) if scale in graph.wanted else None
    bias = node.input[2] if len(node.input) > 2 else ""
    grad_bias = graph.sum_to(gradient, shape, graph.shape(bias)) if bias in graph.wanted else None
    grad_x = None
    if x in graph.wanted:
        if not is_constant(graph, scale, 1):
            gradient, weighted = graph.op("Mul", gradient, scale), graph.op("Mul", weighted, scale)
        drift, share = (graph.op("ReduceMean", value, graph.ints(*axes)) for value in (gradient, weighted))
        rest = graph.op("Sub", graph.op("Sub", gradient, drift), graph.op("Mul", normal, share))
        grad_x = graph.op("Mul", rest, inverse)
    return [grad_x, grad_scale, grad_bias]


def _forward_group(graph: Graph, node: NodeProto) -> None:
    (x, scale, bias), y, given = node.input, node.output[0], attributes(node)
    groups, channels, pixels = _sizes(graph, node)
    flat = graph.op("Reshape", x, graph.ints(-1, groups, channels * pixels))
    centred = _normalize(graph, flat, [2], given["epsilon"], y)
    by_channel = graph.ints(1, groups, channels)
    weight = (
        graph.op("Reshape", scale, by_channel) if scale else graph.array(np.ones((1, groups, channels), np.float32))
    )
    slope = graph.op("Mul", f"{y}.inverse", weight)
    shift = ""
    if bias:
        zeros = graph.op("Mul", slope, graph.scalar(0.0))
        shift = graph.op("Reshape", graph.op("Add", zeros, graph.op("Reshape", bias, by_channel)), graph.ints(-1))
    slope = graph.define(f"{y}.slope", "Reshape", slope, graph.ints(-1))
    rows = graph.op("Reshape", centred, graph.ints(1, -1, pixels))  # [1, N · C, pixels]
    static = [size for size in graph.shape(x)[1:] if isinstance(size, int)]
    graph.define(y, "Reshape", scale_and_shift(graph, rows, slope, shift), graph.ints(-1, *static))


@rule(GROUP)
def group_normalization(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient of x: g · slope - c · inverse³ mean(scale s2) - inverse mean(scale s1).

    Here s1 = Σ g and s2 = Σ g c by channel.
    """
    (x, scale, bias), y, gradient = node.input, node.output[0], gradients[0]
    assert gradient is not None
    groups, channels, pixels = _sizes(graph, node)
    shape = graph.ints(-1, groups, channels, pixels)
    g, c = (graph.op("Reshape", value, shape) for value in (gradient, f"{y}.centred"))
    s1, s2 = graph.sum(g, [3]), graph.sum(graph.op("Mul", g, c), [3])  # sums over the last axis are the fast ones
    inverse = f"{y}.inverse"
    grad_x = grad_scale = grad_bias = None
    if bias in graph.wanted:
        grad_bias = graph.reshape_like(graph.sum(s1, [0]), bias)
    if scale in graph.wanted:
        grad_scale = graph.reshape_like(graph.sum(graph.op("Mul", s2, inverse), [0]), scale)
    if x in graph.wanted:
        if scale:
            weight = graph.op("Reshape", scale, graph.ints(1, groups, channels))
            s1, s2 = graph.op("Mul", s1, weight), graph.op("Mul", s2, weight)
        share = graph.op("Mul", inverse, graph.scalar(-1 / (channels * pixels)))
        drift = graph.op("Mul", graph.sum(s1, [2], keepdims=True), share)
        pull = graph.op("Mul", graph.sum(s2, [2], keepdims=True), share)
        pull = graph.op("Mul", pull, graph.op("Mul", inverse, inverse))
        by_group, everything = graph.ints(1, -1, channels * pixels), graph.ints(-1)
        pull, drift = (graph.op("Reshape", value, everything) for value in (pull, drift))
        rest = scale_and_shift(graph, graph.op("Reshape", c, by_group), pull, drift)
        by_channel = graph.ints(1, -1, pixels)
        scaled = scale_and_shift(graph, graph.op("Reshape", gradient, by_channel), f"{y}.slope", "")
        grad_x = graph.op("Add", graph.reshape_like(scaled, x), graph.reshape_like(rest, x))
    return [grad_x, grad_scale, grad_bias]


def fuse(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Replace each group normalization, as `export.forward.translations` writes it, with one `GROUP` node.

    That is a Reshape to [N, groups, rest], a LayerNormalization without scale and bias, a Reshape back, and often a Mul
    by a scale and an Add of a bias by channel.
    """
    users: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    makers = {name: node for node in nodes for name in node.output}
    replaced: dict[str, NodeProto] = {}
    dropped: set[str] = set()
    for node in nodes:
        chain = _chain(graph, node, makers, users)
        if chain is None:
            continue
        grouping, end, scale, bias = chain
        given = {"groups": graph.shape(node.input[0])[1], "epsilon": attributes(node).get("epsilon", 1e-5)}
        inputs = [grouping.input[0], scale, bias]
        replaced[end.output[0]] = helper.make_node(GROUP, inputs, [end.output[0]], name=node.name, **given)
        inner = [grouping.output[0], node.output[0]]
        while inner[-1] != end.output[0]:
            inner.append(users[inner[-1]][0].output[0])
        dropped.update(inner)
    return [
        replaced.get(node.output[0], node)
        for node in nodes
        if node.output[0] not in dropped or node.output[0] in replaced
    ]


def _chain(
    graph: Graph, node: NodeProto, makers: dict[str, NodeProto], users: dict[str, list[NodeProto]]
) -> tuple[NodeProto, NodeProto, str, str] | None:
    """Reshape before and last node after a LayerNormalization that is a group normalization, its scale and its bias."""
    if node.op_type != "LayerNormalization" or len(graph.shape(node.input[0])) != 3:
        return None
    grouping, back = makers.get(node.input[0]), users.get(node.output[0], [])
    plain = is_constant(graph, node.input[1], 1) and (len(node.input) < 3 or is_constant(graph, node.input[2], 0))
    if grouping is None or grouping.op_type != "Reshape" or len(users[node.input[0]]) != 1 or not plain:
        return None
    if len(back) != 1 or back[0].op_type != "Reshape":
        return None
    shape = graph.shape(grouping.input[0])
    examples, groups, _ = graph.shape(node.input[0])
    if len(shape) < 2 or graph.shape(back[0].output[0]) != shape or examples != shape[0]:
        return None
    growing = any(isinstance(size, Batch) for size in shape[1:])
    if growing or not isinstance(shape[1], int) or not isinstance(groups, int) or shape[1] % groups:
        return None
    end, found = back[0], []
    for operator in ("Mul", "Add"):
        following = users.get(end.output[0], [])
        by_channel = ""
        if len(following) == 1 and following[0].op_type == operator:
            (by_channel,) = [name for name in following[0].input if name != end.output[0]] or [""]
        if by_channel and graph.shape(by_channel) == (shape[1], *[1] * (len(shape) - 2)):
            end = following[0]
            found.append(by_channel)
        else:
            found.append("")
    return grouping, end, found[0], found[1]


def _normalize(graph: Graph, x: str, axes: Sequence[int], epsilon: float, y: str) -> str:
    """Append `y.centred` and `y.inverse`; return the first."""
    centred = graph.define(f"{y}.centred", "Sub", x, graph.op("ReduceMean", x, graph.ints(*axes)))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), graph.ints(*axes))
    deviation = graph.op("Sqrt", graph.op("Add", variance, graph.scalar(epsilon)))
    graph.define(f"{y}.inverse", "Reciprocal", deviation)
    return centred


def _normalized_axes(graph: Graph, node: NodeProto) -> list[int]:
    rank = len(graph.shape(node.input[0]))
    return list(range(attributes(node).get("axis", -1) % rank, rank))


def _sizes(graph: Graph, node: NodeProto) -> tuple[int, int, int]:
    """Numbers of groups, of channels in a group, and of pixels in a channel."""
    groups: int = attributes(node)["groups"]
    channels, *spatial = (size for size in graph.shape(node.input[0])[1:] if isinstance(size, int))
    return groups, channels // groups, prod(spatial)


def is_constant(graph: Graph, value: str, number: float) -> bool:
    """Whether a value never changes and all its entries are one number."""
    array = graph.constant(value) if value else None
    return array is not None and bool(np.all(array == number))
