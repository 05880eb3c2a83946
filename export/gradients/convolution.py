"""Convolution and its gradients, lowered to the products that onnxruntime computes fastest.

onnxruntime unrolls the patches of a Conv in blocks, in parallel, while it multiplies; any other way to unroll them
(slices, concatenation, transposition) is copied through memory by one thread. So all three products are Convs where
possible. For x [N, I, *S] and w [O, I/G, *K], with y [N, O, *T]:

- y and the input's gradient are ordinary Convs or, where images are small, Convs of one image [1, C, N, *S] of depth N,
  whose matrix product has N·|T| columns instead of |T|. The input's gradient uses the mirrored kernel, made by a
  product with a permutation, or is a ConvTranspose where the stride is not 1.
- The weight's gradient is a Conv as well: examples are its channels, and the entries of y's gradient its kernel. The
  input channels lie along a last axis on which the kernel has size 1, [G·N, *S, I/G], so that whole runs are copied.
  Those of a depthwise convolution and of one of few channels have modules of their own (`depthwise`, `patches`).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from onnx import NodeProto

from export.gradients import patches
from export.gradients.builder import Graph
from export.gradients.depthwise import grad_weight_of_images, grad_weight_of_signals
from export.gradients.geometry import Convolution
from export.gradients.rules import Gradients, rule

MERGED_PIXELS = 36  # most pixels of y (6 x 6) with which the batch is merged into one image; measured


def forward(graph: Graph, node: NodeProto) -> None:
    """Append a Conv of the forward graph, with its output under the same name."""
    facts = Convolution.from_conv(graph, node)
    x, weight, *bias = node.input
    given: dict[str, Any] = {
        "strides": facts.strides,
        "dilations": facts.dilations,
        "pads": [*facts.before, *facts.after],
        "group": facts.groups,
    }
    if not _merges(graph, facts):
        graph.define(node.output[0], "Conv", x, weight, *bias, kernel_shape=facts.kernel, **given)
        return
    merged = _merge(graph, x, [facts.channels, *facts.size])
    kernel = graph.reshape(weight, [facts.filters, facts.channels, 1, *facts.kernel])
    y = graph.op("Conv", merged, kernel, *bias, **_with_depth({**given, "kernel_shape": facts.kernel}))
    _unmerge(graph, y, [facts.filters, *facts.out], name=node.output[0])


@rule("Conv")
def conv(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    facts = Convolution.from_conv(graph, node)
    x, weight, *bias = node.input
    grad_x = _grad_input(graph, facts, gradient, weight) if x in graph.wanted else None
    grad_weight = _grad_weight(graph, facts, gradient, x) if weight in graph.wanted else None
    grad_bias = None
    if bias and bias[0] in graph.wanted:
        grad_bias = _grad_bias(graph, gradient, facts.filters, facts.out)
    return [grad_x, grad_weight, grad_bias]


@rule("ConvTranspose")
def conv_transpose(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradients by the convolution that is transposed.

    It maps the output's gradient to the input's; the weight's gradient is that of this convolution.
    """
    (gradient,) = gradients
    assert gradient is not None
    facts = Convolution.from_conv_transpose(graph, node)
    x, weight, *bias = node.input
    grad_x = grad_weight = grad_bias = None
    if x in graph.wanted:
        grad_x = graph.op(
            "Conv",
            gradient,
            weight,
            kernel_shape=facts.kernel,
            strides=facts.strides,
            dilations=facts.dilations,
            pads=[*facts.before, *facts.after],
            group=facts.groups,
        )
    if weight in graph.wanted:
        grad_weight = _grad_weight(graph, facts, x, gradient)
    if bias and bias[0] in graph.wanted:
        grad_bias = _grad_bias(graph, gradient, facts.channels, facts.size)
    return [grad_x, grad_weight, grad_bias]


def _grad_bias(graph: Graph, gradient: str, filters: int, pixels: list[int]) -> str:
    return graph.sum(graph.op("Reshape", gradient, graph.ints(-1, filters, prod(pixels))), [0, 2])


def _grad_input(graph: Graph, facts: Convolution, gradient: str, weight: str) -> str:
    before = [r - p for r, p in zip(facts.reach, facts.before, strict=True)]
    after = [r - p for r, p in zip(facts.reach, facts.after, strict=True)]
    widens = facts.channels < facts.filters and not _merges(graph, facts)  # then ConvTranspose unrolls fewer channels
    mirrors = set(facts.strides) == {1} and min(before + after) >= 0 and not widens
    given: dict[str, Any] = {"dilations": facts.dilations, "kernel_shape": facts.kernel}
    if not mirrors:
        return graph.op(
            "ConvTranspose",
            gradient,
            weight,
            strides=facts.strides,
            pads=[*facts.before, *facts.after],
            output_padding=facts.left_over,
            group=facts.groups,
            **given,
        )
    kernel = _mirrored(graph, facts, weight)
    pads = [*before, *after]
    if not _merges(graph, facts):
        return graph.op("Conv", gradient, kernel, pads=pads, group=facts.groups, **given)
    merged = _merge(graph, gradient, [facts.filters, *facts.out])
    deep = graph.reshape(kernel, [facts.channels, facts.filters, 1, *facts.kernel])
    grad_x = graph.op("Conv", merged, deep, **_with_depth({"pads": pads, **given}))
    return _unmerge(graph, grad_x, [facts.channels, *facts.size])


def _merges(graph: Graph, facts: Convolution) -> bool:
    """Whether the batch is computed as one image."""
    is_plain = facts.groups == 1 and len(facts.kernel) < 3
    return is_plain and not graph.direct and prod(facts.out) <= MERGED_PIXELS


def _grad_weight(graph: Graph, facts: Convolution, gradient: str, x: str) -> str:
    rank = len(facts.kernel)
    if facts.is_depthwise and rank < 3:
        return (grad_weight_of_images if rank == 2 else grad_weight_of_signals)(graph, facts, gradient, x)
    if patches.applies(facts):
        return patches.grad_weight(graph, facts, gradient, x)
    spatial = list(range(2, 2 + rank))
    groups, inner = facts.groups, facts.channels // facts.groups
    after = [a - left_over for a, left_over in zip(facts.after, facts.left_over, strict=True)]
    size = [n + min(a, 0) for n, a in zip(facts.size, after, strict=True)]
    if size != facts.size:  # pixels that no position of the kernel reaches
        x = graph.op("Slice", x, graph.ints(*[0] * rank), graph.ints(*size), graph.ints(*spatial))
    if groups == 1:
        wide = graph.op("Unsqueeze", graph.transpose(x, [0, *spatial, 1]), graph.ints(0))
    else:
        grouped = graph.op("Reshape", x, graph.ints(-1, groups, inner, *size))
        wide = graph.transpose(grouped, [1, 0, *(axis + 1 for axis in spatial), 2])
        wide = graph.op("Reshape", wide, graph.ints(1, -1, *size, inner))
    kernel = graph.op("Unsqueeze", graph.transpose(gradient, [1, 0, *spatial]), graph.ints(-1))
    grad_weight = graph.op(
        "Conv",
        wide,
        kernel,
        kernel_shape=[*facts.out, 1],
        strides=[*facts.dilations, 1],
        dilations=[*facts.strides, 1],
        pads=[*facts.before, 0, *(max(a, 0) for a in after), 0],
        group=groups,
    )
    grad_weight = graph.reshape(grad_weight, [facts.filters, *facts.kernel, inner])
    return graph.transpose(grad_weight, [0, 1 + rank, *range(1, 1 + rank)])


def _merge(graph: Graph, value: str, shape: list[int]) -> str:
    """Rearrange [N, C, *S] as one image [1, C, N, *S]."""
    axes = range(2, 1 + len(shape))
    return graph.op("Unsqueeze", graph.transpose(value, [1, 0, *axes]), graph.ints(0))


def _unmerge(graph: Graph, value: str, shape: list[int], name: str | None = None) -> str:
    """Undo `_merge`."""
    flat = graph.op("Squeeze", value, graph.ints(0))
    perm = [1, 0, *range(2, 1 + len(shape))]
    return graph.define(name or graph.name("Transpose"), "Transpose", flat, perm=perm)


def _with_depth(given: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a Conv with one more spatial axis, the first, on which the kernel has size 1."""
    deep = dict(given)
    for key in ("strides", "dilations"):
        if key in deep:
            deep[key] = [1, *deep[key]]
    half = len(deep["pads"]) // 2
    deep["pads"] = [0, *deep["pads"][:half], 0, *deep["pads"][half:]]
    deep["kernel_shape"] = [1, *deep["kernel_shape"]]
    return deep


def _mirrored(graph: Graph, facts: Convolution, weight: str) -> str:
    """Weight [O, I/G, *K] as [I, O/G, *K], with every kernel reversed."""
    size, inner, outer = prod(facts.kernel), facts.channels // facts.groups, facts.filters // facts.groups
    rows = graph.op("Reshape", weight, graph.ints(facts.groups, outer, inner, size))
    if size > 1:
        rows = graph.op("MatMul", rows, graph.array(np.eye(size, dtype=np.float32)[::-1].copy()))
    return graph.reshape(graph.transpose(rows, [0, 2, 1, 3]), [facts.channels, outer, *facts.kernel])
