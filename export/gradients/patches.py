"""Gradient of the weight of a convolution of few channels, such as the first of a network, by its patches.

As a Conv whose kernel is y's gradient, it would have as few rows of products as x has channels. A Conv with a constant
kernel of zeros and ones copies the patches instead, and they are multiplied with the gradient, example by example: for
x [N, I, *S] and w [O, I, *K], with y [N, O, *T],

    dw = sum over examples of dy [O, T] patches [I·K, T]ᵀ
"""

from __future__ import annotations

from math import prod

import numpy as np

from export.gradients.builder import Graph
from export.gradients.geometry import Convolution

MOST_ENTRIES = 32
"""Most entries I·K of a filter; measured."""
MOST_PIXELS = 1024
"""Most pixels T of y, as all patches of a batch are in memory at once."""


def applies(facts: Convolution) -> bool:
    """Whether the gradient of a weight is computed this way."""
    return facts.groups == 1 and _entries(facts) <= MOST_ENTRIES and prod(facts.out) <= MOST_PIXELS


def grad_weight(graph: Graph, facts: Convolution, gradient: str, x: str) -> str:
    """Gradient of a weight [O, I, *K] from that of y [N, O, *T]."""
    entries, pixels = _entries(facts), prod(facts.out)
    pick = np.eye(entries, dtype=np.float32).reshape(entries, facts.channels, *facts.kernel)
    seen = graph.op(
        "Conv",
        x,
        graph.array(pick),
        kernel_shape=facts.kernel,
        strides=facts.strides,
        dilations=facts.dilations,
        pads=[*facts.before, *facts.after],
    )
    patches, slopes = (
        graph.op("Reshape", value, graph.ints(-1, rows, pixels))
        for value, rows in ((seen, entries), (gradient, facts.filters))
    )
    products = graph.op("MatMul", slopes, graph.transpose(patches, [0, 2, 1]))
    return graph.reshape(graph.sum(products, [0]), [facts.filters, facts.channels, *facts.kernel])


def _entries(facts: Convolution) -> int:
    return facts.channels * prod(facts.kernel)
