"""Lowerings of the three products of a convolution: the exporter's and its alternatives, by layers of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from contests import Contest, Lowering, exported, graph_of, random_arrays, with_gradients
from numpy.typing import NDArray
from onnx import NodeProto, helper
from torch import Tensor
from torch.nn import functional as F

from export.gradients import Graph, convolution, differentiate, winograd
from export.gradients.builder import attributes
from export.gradients.geometry import Convolution


class Conv(NamedTuple):
    """Convolution of square images."""

    channels: int
    filters: int
    size: int
    kernel: int = 3
    stride: int = 1

    @property
    def pad(self) -> int:
        return self.kernel // 2

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.channels}x{self.size}x{self.size} -> {self.filters}, {self.kernel}x{self.kernel}{stride}"


CONVOLUTIONS = {
    "cnn conv1": Conv(1, 32, 28),
    "cnn conv2": Conv(32, 64, 14),
    "cnn conv3": Conv(64, 128, 7),
    "cnn conv4": Conv(128, 256, 3),
    "vgg16 conv1_1": Conv(3, 64, 32),
    "vgg16 conv1_2": Conv(64, 64, 32),
    "vgg16 conv2_1": Conv(64, 128, 16),
    "vgg16 conv2_2": Conv(128, 128, 16),
    "vgg16 conv3_1": Conv(128, 256, 8),
    "vgg16 conv3_2": Conv(256, 256, 8),
    "vgg16 conv4_1": Conv(256, 512, 4),
    "vgg16 conv4_2": Conv(512, 512, 4),
    "vgg16 conv5_1": Conv(512, 512, 2),
    "resnet18 block2_1.conv1": Conv(64, 128, 32, stride=2),
    "resnet18 block2_1.shortcut": Conv(64, 128, 32, kernel=1, stride=2),
    "resnet18 block4_1.conv1": Conv(256, 512, 8, stride=2),
    "resnet18 block4_1.shortcut": Conv(256, 512, 8, kernel=1, stride=2),
}


# Convolution: from x [N, I, H, W], w [O, I, K1, K2] and dy [N, O, T1, T2]


def plain(graph: Graph, facts: Convolution) -> str:
    """Result y as a Conv, whose matrix products have as many columns as an image of y has pixels."""
    return graph.op("Conv", "x", "w", strides=facts.strides, pads=[*facts.before, *facts.after])


def merged(graph: Graph, facts: Convolution) -> str:
    """Result y as a Conv with the batch as the depth of one image, which costs two transpositions."""
    pads = [0, *facts.before, 0, *facts.after]
    kernel = graph.op("Unsqueeze", "w", graph.ints(2))
    return _unmerged(graph, graph.op("Conv", _merged(graph, "x"), kernel, strides=[1, *facts.strides], pads=pads))


def mirrored(graph: Graph, facts: Convolution) -> str:
    """Gradient of x as a Conv with the mirrored kernel."""
    return graph.op("Conv", "dy", _mirrored(graph, facts), pads=_mirrored_pads(facts, 0))


def mirrored_merged(graph: Graph, facts: Convolution) -> str:
    """Gradient of x as a Conv with the mirrored kernel and the batch as the depth of one image."""
    kernel = graph.op("Unsqueeze", _mirrored(graph, facts), graph.ints(2))
    return _unmerged(graph, graph.op("Conv", _merged(graph, "dy"), kernel, pads=_mirrored_pads(facts, 1)))


def transposed(graph: Graph, facts: Convolution) -> str:
    """Gradient of x as a ConvTranspose."""
    pads = [*facts.before, *facts.after]
    return graph.op("ConvTranspose", "dy", "w", strides=facts.strides, pads=pads, output_padding=facts.left_over)


def shifted_sums(graph: Graph, facts: Convolution) -> str:
    """Gradient of x as one MatMul to the columns of all positions of the kernel, and their sum where they belong."""
    (height, width), count = facts.kernel, prod(facts.kernel)
    rows = graph.reshape(graph.transpose("w", [2, 3, 1, 0]), [count * facts.channels, facts.filters])
    columns = graph.op("MatMul", rows, graph.reshape(_swapped(graph, "dy"), [facts.filters, -1]))
    columns = graph.reshape(columns, [count, facts.channels, -1, *facts.out])
    parts = graph.ops("Split", columns, outputs=count, axis=0, num_outputs=count) if count > 1 else [columns]
    placed = [
        graph.op("Pad", part, graph.ints(a, b, height - 1 - a, width - 1 - b), "", graph.ints(3, 4))
        for part, (a, b) in zip(parts, _positions(facts), strict=True)
    ]
    ends = [b + n for b, n in zip(facts.before, facts.size, strict=True)]
    total = graph.op("Slice", graph.op("Sum", *placed), graph.ints(*facts.before), graph.ints(*ends), graph.ints(3, 4))
    return _swapped(graph, graph.op("Squeeze", total, graph.ints(0)))


def axes_swapped(graph: Graph, facts: Convolution) -> str:
    """Gradient of w as a Conv of a batch of input channels, whose channels are the examples, with dy as the kernel."""
    images, kernel = _swapped(graph, "x"), _swapped(graph, "dy")
    pads = [*facts.before, *facts.after]
    grad_weight = graph.op("Conv", images, kernel, strides=facts.dilations, dilations=facts.strides, pads=pads)
    if any(facts.left_over):
        grad_weight = graph.op("Slice", grad_weight, graph.ints(0, 0), graph.ints(*facts.kernel), graph.ints(2, 3))
    return _swapped(graph, grad_weight)


def slices_matmul(graph: Graph, facts: Convolution) -> str:
    """Gradient of w from shifted slices of x [I, N, H, W], joined, as one product over all pixels and examples."""
    columns = _joined(graph, _slices(graph, facts, _swapped(graph, "x"), (2, 3)), axis=0)
    columns = graph.reshape(columns, [prod(facts.kernel) * facts.channels, -1])
    rows = graph.reshape(_swapped(graph, "dy"), [facts.filters, -1])
    return _as_weight(graph, facts, graph.op("Gemm", rows, columns, transB=1))


def slices_last(graph: Graph, facts: Convolution) -> str:
    """Gradient of w from shifted slices of x [N, H, W, I], concatenated by pixel, in one product."""
    columns = _joined(graph, _slices(graph, facts, graph.transpose("x", [0, 2, 3, 1]), (1, 2)), axis=3)
    columns = graph.reshape(columns, [-1, prod(facts.kernel) * facts.channels])
    rows = graph.reshape(_swapped(graph, "dy"), [facts.filters, -1])
    return _as_weight(graph, facts, graph.op("MatMul", rows, columns))


def slices_by_example(graph: Graph, facts: Convolution) -> str:
    """Gradient of w from shifted slices of x as it is, as the sum of one product for each example."""
    columns = _joined(graph, _slices(graph, facts, "x", (2, 3)), axis=1)
    columns = graph.reshape(columns, [-1, prod(facts.kernel) * facts.channels, prod(facts.out)])
    rows = graph.reshape("dy", [-1, facts.filters, prod(facts.out)])
    products = graph.op("MatMul", rows, graph.transpose(columns, [0, 2, 1]))
    return _as_weight(graph, facts, graph.sum(products, [0]))


@dataclass(frozen=True)
class Product:
    """One of the three products of a convolution.

    Attributes:
        title: Title of the product's table.
        of: Input whose gradient the product is; None for y.
        known: Names of the exporter's lowerings, by operator and number of axes of its kernel.
        lowerings: Lowerings by name, without those that only the exporter has.
    """

    title: str
    of: str | None
    known: Mapping[tuple[str, int], str]
    lowerings: Mapping[str, Callable[[Graph, Convolution], str]]


PRODUCTS = (
    Product("convolution", None, {("Conv", 2): "Conv", ("Conv", 3): "merged"}, {"Conv": plain, "merged": merged}),
    Product(
        "convolution: gradient of the input",
        "x",
        {("Conv", 2): "mirrored", ("Conv", 3): "merged", ("ConvTranspose", 2): "ConvTranspose"},
        {
            "mirrored": mirrored,
            "merged": mirrored_merged,
            "ConvTranspose": transposed,
            "shifted sums": shifted_sums,
        },
    ),
    Product(
        "convolution: gradient of the weight",
        "w",
        {("Conv", 3): "Conv", ("Conv", 2): "patches"},
        {
            "Conv, swapped": axes_swapped,
            "slices": slices_matmul,
            "slices, NHWC": slices_last,
            "slices, by example": slices_by_example,
        },
    ),
)
UNSTRIDED = (mirrored, mirrored_merged, shifted_sums)
"""Lowerings that exist only for a stride of 1."""


def convolution_contests(layer: str, conv: Conv, batch: int) -> Iterator[Contest]:
    """Contests of a convolution, of its two gradients, and of all three by Winograd's filtering."""
    out = (conv.size + 2 * conv.pad - conv.kernel) // conv.stride + 1
    arrays = random_arrays(
        x=(batch, conv.channels, conv.size, conv.size),
        w=(conv.filters, conv.channels, conv.kernel, conv.kernel),
        dy=(batch, conv.filters, out, out),
    )
    given: dict[str, Any] = {"strides": [conv.stride] * 2, "pads": [conv.pad] * 4, "kernel_shape": [conv.kernel] * 2}
    node = helper.make_node("Conv", ["x", "w"], ["y"], **given)
    for product in PRODUCTS:
        by, forward = ([product.of], None) if product.of else ([], convolution.forward)
        lowering = exported(node, arrays, by, forward=forward)
        chosen = product.known[_kernel(lowering[0])]
        lowerings: dict[str, Lowering] = {chosen: lowering}
        for name, append in product.lowerings.items():
            if name != chosen and (conv.stride == 1 or append not in UNSTRIDED):
                graph = graph_of(arrays)
                lowerings[name] = graph, [append(graph, Convolution.from_conv(graph, node))]
        reference = partial(_torch_convolution, arrays, conv, product.of)
        yield Contest(product.title, layer, str(conv), arrays, lowerings, chosen, reference)
    if conv.kernel == 3 and conv.stride == 1 and conv.size**2 <= max(pixels for pixels, _ in winograd.LIMITS):
        yield _winograd_contest(layer, conv, node, arrays)


def _winograd_contest(layer: str, conv: Conv, node: NodeProto, arrays: Mapping[str, NDArray[np.float32]]) -> Contest:
    """Contest of a convolution together with both gradients, of a weight that is not composed."""
    graph, by = graph_of(arrays), ["x", "w"]
    nodes = winograd.fuse(graph, [node], lambda _: True)
    graph.nodes.extend(nodes[:-1])
    winograd.forward(graph, nodes[-1])
    gradients = differentiate(graph, nodes, {"y": "dy"}, by)
    lowerings: dict[str, Lowering] = {
        "Conv": exported(node, arrays, by, forward=convolution.forward),
        "Winograd": (graph, ["y", *(gradients[name] for name in by)]),
    }
    chosen = "Winograd" if winograd.is_faster(Convolution.from_conv(graph, node)) else "Conv"
    reference = with_gradients(lambda x, w: F.conv2d(x, w, None, conv.stride, conv.pad), arrays, by)
    return Contest("convolution with both gradients", layer, str(conv), arrays, lowerings, chosen, reference)


def _torch_convolution(arrays: Mapping[str, NDArray[Any]], conv: Conv, of: str | None) -> Sequence[Tensor]:
    x, w, dy = (torch.from_numpy(arrays[name]) for name in ("x", "w", "dy"))
    strides, pads = [conv.stride] * 2, [conv.pad] * 2
    if of is None:
        return [F.conv2d(x, w, None, strides, pads)]
    wanted = [of == "x", of == "w", False]
    found = torch.ops.aten.convolution_backward(dy, x, w, None, strides, pads, [1, 1], False, [0, 0], 1, wanted)
    return [tensor for tensor, kept in zip(found, wanted, strict=True) if kept]


def _kernel(graph: Graph) -> tuple[str, int]:
    """Operator of the one convolution in a graph, and number of axes of its kernel."""
    (node,) = (node for node in graph.nodes if node.op_type in ("Conv", "ConvTranspose"))
    return node.op_type, len(attributes(node)["kernel_shape"])


def _mirrored_pads(facts: Convolution, depth: int) -> list[int]:
    """Pads of a mirrored kernel with `depth` more axes."""
    sides = ([r - p for r, p in zip(facts.reach, pads, strict=True)] for pads in (facts.before, facts.after))
    return [pad for side in sides for pad in (*[0] * depth, *side)]


def _mirrored(graph: Graph, facts: Convolution) -> str:
    rows = graph.reshape("w", [facts.filters, facts.channels, prod(facts.kernel)])
    rows = graph.op("MatMul", rows, graph.array(np.eye(prod(facts.kernel), dtype=np.float32)[::-1].copy()))
    return graph.reshape(graph.transpose(rows, [1, 0, 2]), [facts.channels, facts.filters, *facts.kernel])


def _merged(graph: Graph, value: str) -> str:
    return graph.op("Unsqueeze", _swapped(graph, value), graph.ints(0))


def _unmerged(graph: Graph, value: str) -> str:
    return _swapped(graph, graph.op("Squeeze", value, graph.ints(0)))


def _swapped(graph: Graph, value: str) -> str:
    return graph.transpose(value, [1, 0, 2, 3])


def _positions(facts: Convolution) -> Iterator[tuple[int, ...]]:
    return np.ndindex(*facts.kernel)


def _slices(graph: Graph, facts: Convolution, value: str, axes: tuple[int, int]) -> list[str]:
    """Pixels that each position of the kernel meets, by position."""
    if any((*facts.before, *facts.after)):
        value = graph.op("Pad", value, graph.ints(*facts.before, *facts.after), "", graph.ints(*axes))
    spans = [(t - 1) * s + 1 for t, s in zip(facts.out, facts.strides, strict=True)]
    return [
        graph.op(
            "Slice",
            value,
            graph.ints(*starts),
            graph.ints(*(start + span for start, span in zip(starts, spans, strict=True))),
            graph.ints(*axes),
            graph.ints(*facts.strides),
        )
        for starts in _positions(facts)
    ]


def _joined(graph: Graph, values: Sequence[str], *, axis: int) -> str:
    return graph.op("Concat", *values, axis=axis) if len(values) > 1 else values[0]


def _as_weight(graph: Graph, facts: Convolution, rows: str) -> str:
    """Rows [O, K1 K2 I] rearranged as a weight [O, I, K1, K2]."""
    return graph.transpose(graph.reshape(rows, [facts.filters, *facts.kernel, facts.channels]), [0, 3, 1, 2])
