"""Gradient of the weight of a depthwise convolution, whose every filter sees one channel.

As a Conv in which the output's gradient is the kernel, it would copy every patch for the sake of one row of products.
For x [N, C, *S] and w [C·M, 1, *K], with y [N, C·M, *T]:

- On images, rows of the gradient are multiplied with the rows of x under each row of the kernel, for each channel and
  summed over the examples and rows of y: [M·T2, N·T1] [N·T1, K1·S2]. Of these products of all pixels of two rows, those
  count that a column of the kernel brings together: a product with a constant of zeros and ones sums them.
- On signals, each position of the kernel is a slice of x, multiplied with the gradient and summed.
"""

from __future__ import annotations

import numpy as np

from export.gradients.builder import Graph
from export.gradients.geometry import Convolution


def grad_weight_of_images(graph: Graph, facts: Convolution, gradient: str, x: str) -> str:
    """Gradient of a weight [C·M, 1, K1, K2] from that of y [N, C·M, T1, T2]."""
    (height, width), (out_height, out_width) = facts.kernel, facts.out
    filters = facts.filters // facts.channels
    rows = [[t * facts.strides[0] + k * facts.dilations[0] for k in range(height)] for t in range(out_height)]
    lines = graph.transpose(_padded(graph, facts, x, axes=1), [1, 0, 2, 3])
    lines = graph.op("Gather", lines, graph.array(np.array(rows, np.int64)), axis=2)  # [C, N, T1, K1, S2]
    lines = graph.op("Reshape", lines, graph.ints(facts.channels, -1, height * facts.size[1]))
    slopes = graph.op("Reshape", gradient, graph.ints(-1, facts.channels, filters, *facts.out))
    slopes = graph.transpose(slopes, [1, 0, 3, 2, 4])
    slopes = graph.op("Reshape", slopes, graph.ints(facts.channels, -1, filters * out_width))
    products = graph.op("MatMul", graph.transpose(slopes, [0, 2, 1]), lines)
    products = graph.reshape(products, [facts.filters, out_width, height, facts.size[1]])
    products = graph.reshape(graph.transpose(products, [0, 2, 1, 3]), [facts.filters * height, -1])
    meeting = np.zeros((out_width, facts.size[1], width), np.float32)
    for t in range(out_width):
        for k in range(width):
            pixel = t * facts.strides[1] + k * facts.dilations[1] - facts.before[1]
            if 0 <= pixel < facts.size[1]:
                meeting[t, pixel, k] = 1
    grad_weight = graph.op("MatMul", products, graph.array(meeting.reshape(-1, width)))
    return graph.reshape(grad_weight, [facts.filters, 1, height, width])


def grad_weight_of_signals(graph: Graph, facts: Convolution, gradient: str, x: str) -> str:
    """Gradient of a weight [C·M, 1, K] from that of y [N, C·M, T]."""
    (width,), (out,), (stride,) = facts.kernel, facts.out, facts.strides
    padded = graph.op("Unsqueeze", _padded(graph, facts, x, axes=1), graph.ints(2))  # [N, C, 1, S]
    slopes = graph.op("Reshape", gradient, graph.ints(-1, facts.channels, facts.filters // facts.channels, out))
    sums = []
    for k in range(width):
        first = k * facts.dilations[0]
        ends = graph.ints(first), graph.ints(first + (out - 1) * stride + 1)
        seen = graph.op("Slice", padded, *ends, graph.ints(3), graph.ints(stride))
        sums.append(graph.sum(graph.op("Mul", seen, slopes), [0, 3]))
    stacked = graph.op("Concat", *(graph.op("Unsqueeze", each, graph.ints(2)) for each in sums), axis=2)
    return graph.reshape(stacked, [facts.filters, 1, width])


def _padded(graph: Graph, facts: Convolution, x: str, *, axes: int) -> str:
    """x with its zeros around the first of its spatial axes."""
    before, after = facts.before[:axes], [max(n, 0) for n in facts.after[:axes]]
    if not any((*before, *after)):
        return x
    others = [0] * (len(facts.size) - axes)
    return graph.op("Pad", x, graph.ints(0, 0, *before, *others, 0, 0, *after, *others))
