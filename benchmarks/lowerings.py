"""Lowerings of convolution, pooling, ReLU and normalization to ONNX operators: the exporter's and its alternatives.

A table for each, with a row for each shape. The column that `chosen` names is measured on the very graph that the
exporter appends for such a layer; the others are the alternatives that it does not choose there. Each is compared with
torch before it is timed. The lowerings of a row take turns, and each figure is a median; only the ratios are meant to
carry over to other machines. `chosen/fastest` is what choosing by measurement would gain.

    python benchmarks/lowerings.py --layers "cnn *" --json lowerings.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from device import median_ms
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from parts import keep_options, measure_parts
from torch import Tensor
from torch.nn import functional as F

from device_runtime.engines.ort import InferenceSession, keep_freed_memory, session_options
from export.forward.graph import IR_VERSION, OPSET
from export.forward.tracing import Batch, Shape, Trace
from export.gradients import Graph, convolution, differentiate, normalization, pooling, winograd
from export.gradients.builder import attributes, initializers_of, needed
from export.gradients.geometry import Convolution
from export.gradients.normalization import GROUP
from fedpara_edge.cli.output import table
from fedpara_edge.nn.groupnorm import group_count

TOLERANCE = 1e-3
"""Largest error, relative to the largest entry: sums of up to 32768 products in float32, in several orders."""
OURS, TORCH = "ours", "torch"
BATCHES = ("x", "y", "dy")
"""Names of the arrays whose first axis is the batch."""


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


class Pool(NamedTuple):
    """Max pooling of images."""

    shape: tuple[int, ...]
    kernel: int = 2
    stride: int = 2
    pad: int = 0

    def __str__(self) -> str:
        return f"{_by(self.shape)}, {self.kernel}x{self.kernel}/{self.stride}"


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
POOLS = {
    "cnn pool1": Pool((32, 28, 28)),
    "cnn pool3": Pool((128, 7, 7)),
    "vgg16 pool1": Pool((64, 32, 32)),
    "overlapping pool": Pool((64, 32, 32), kernel=3, stride=2, pad=1),
}
RELUS = {"cnn relu1": (32, 28, 28), "vgg16 relu1_1": (64, 32, 32)}
NORMS = {"cnn norm1": (32, 28, 28), "cnn norm3": (128, 7, 7), "vgg16 norm1_1": (64, 32, 32), "layer norm": (64, 256)}
"""Shapes to normalize: images by groups, vectors over the last axis."""

Lowering = tuple[Graph, Sequence[str]]
"""Graph and the names of its results."""


@dataclass(frozen=True)
class Contest:
    """One row of a table: ways to compute the same from the same arrays.

    Attributes:
        title: Title of the table.
        layer: Name of the layer in its model.
        size: Human-readable shape of the layer.
        arrays: Inputs by name; see `BATCHES`.
        lowerings: Lowerings by name.
        chosen: Name of the exporter's lowering.
        torch: Function that computes the same outputs in torch.
    """

    title: str
    layer: str
    size: str
    arrays: Mapping[str, NDArray[np.float32]]
    lowerings: Mapping[str, Lowering]
    chosen: str
    torch: Callable[[], Sequence[Tensor]]


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
        {("Conv", 3): "Conv", ("Conv", 2): "Conv, swapped"},
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
    arrays = _random(
        x=(batch, conv.channels, conv.size, conv.size),
        w=(conv.filters, conv.channels, conv.kernel, conv.kernel),
        dy=(batch, conv.filters, out, out),
    )
    given: dict[str, Any] = {"strides": [conv.stride] * 2, "pads": [conv.pad] * 4, "kernel_shape": [conv.kernel] * 2}
    node = helper.make_node("Conv", ["x", "w"], ["y"], **given)
    for product in PRODUCTS:
        by, forward = ([product.of], None) if product.of else ([], convolution.forward)
        exported = _exported(node, arrays, by, forward=forward)
        chosen = product.known[_kernel(exported[0])]
        lowerings: dict[str, Lowering] = {chosen: exported}
        for name, append in product.lowerings.items():
            if name != chosen and (conv.stride == 1 or append not in UNSTRIDED):
                graph = _graph(arrays)
                lowerings[name] = graph, [append(graph, Convolution.from_conv(graph, node))]
        reference = partial(_torch_convolution, arrays, conv, product.of)
        yield Contest(product.title, layer, str(conv), arrays, lowerings, chosen, reference)
    if conv.kernel == 3 and conv.stride == 1 and conv.size**2 <= max(pixels for pixels, _ in winograd.LIMITS):
        yield _winograd_contest(layer, conv, node, arrays)


def _winograd_contest(layer: str, conv: Conv, node: NodeProto, arrays: Mapping[str, NDArray[np.float32]]) -> Contest:
    """Contest of a convolution together with both gradients, of a weight that is not composed."""
    graph, by = _graph(arrays), ["x", "w"]
    nodes = winograd.fuse(graph, [node], lambda _: True)
    graph.nodes.extend(nodes[:-1])
    winograd.forward(graph, nodes[-1])
    gradients = differentiate(graph, nodes, {"y": "dy"}, by)
    lowerings: dict[str, Lowering] = {
        "Conv": _exported(node, arrays, by, forward=convolution.forward),
        "Winograd": (graph, ["y", *(gradients[name] for name in by)]),
    }
    chosen = "Winograd" if winograd.is_faster(Convolution.from_conv(graph, node)) else "Conv"
    reference = _with_gradients(lambda x, w: F.conv2d(x, w, None, conv.stride, conv.pad), arrays, by)
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


# Pooling, ReLU and normalization


def pooling_contest(layer: str, pool: Pool, batch: int) -> Contest:
    """Contest of max pooling and its gradient together, as the indices of maxima cost time in the forward pass."""
    channels, *size = pool.shape
    out = [(n + 2 * pool.pad - pool.kernel) // pool.stride + 1 for n in size]
    arrays = _random(x=(batch, *pool.shape), dy=(batch, channels, *out))
    given: dict[str, Any] = {
        "kernel_shape": [pool.kernel] * 2,
        "strides": [pool.stride] * 2,
        "pads": [pool.pad] * 4,
    }
    node = helper.make_node("MaxPool", ["x"], ["y"], **given)

    def unpooled(graph: Graph) -> Sequence[str]:
        y, indices = graph.ops("MaxPool", "x", outputs=2, **given)
        return y, graph.op("MaxUnpool", "dy", indices, graph.op("Shape", "x"), **given)

    def scattered(graph: Graph) -> Sequence[str]:
        y, indices = graph.ops("MaxPool", "x", outputs=2, **given)
        indices, gradient = (graph.reshape(value, [-1]) for value in (indices, "dy"))
        zeros = graph.op("ConstantOfShape", graph.op("Shape", graph.reshape("x", [-1])))
        grad_x = graph.op("ScatterElements", zeros, indices, gradient, axis=0, reduction="add")
        return y, graph.op("Reshape", grad_x, graph.op("Shape", "x"))

    others = {"ScatterElements": scattered}
    if pool.kernel <= pool.stride:
        others = {"MaxUnpool": unpooled, **others}

    reference = _with_gradients(lambda x: F.max_pool2d(x, pool.kernel, pool.stride, pool.pad), arrays, ["x"])
    lowerings = {OURS: _exported(node, arrays, ["x"], forward=pooling.forward), **_appended(others, arrays)}
    return Contest("max pooling and its gradient", layer, str(pool), arrays, lowerings, OURS, reference)


def relu_contest(layer: str, shape: tuple[int, ...], batch: int) -> Contest:
    """Contest of the gradient of ReLU."""
    arrays = _random(x=(batch, *shape), dy=(batch, *shape))
    arrays["y"] = np.maximum(arrays["x"], 0)
    node = helper.make_node("Relu", ["x"], ["y"])

    def compared(graph: Graph) -> Sequence[str]:
        positive = graph.op("Greater", "y", graph.scalar(0.0))
        return [graph.op("Mul", "dy", graph.op("Cast", positive, to=TensorProto.FLOAT))]

    def selected(graph: Graph) -> Sequence[str]:
        return [graph.op("Where", graph.op("Greater", "y", graph.scalar(0.0)), "dy", graph.scalar(0.0))]

    def signed(graph: Graph) -> Sequence[str]:
        return [graph.op("Mul", "dy", graph.op("Sign", "y"))]

    y, dy = (torch.from_numpy(arrays[name]) for name in ("y", "dy"))
    others = {"Greater, Cast, Mul": compared, "Greater, Where": selected, "Sign, Mul": signed}
    lowerings = {OURS: _exported(node, arrays, ["x"]), **_appended(others, arrays)}

    def reference() -> Sequence[Tensor]:
        return [torch.ops.aten.threshold_backward(dy, y, 0.0)]

    return Contest("gradient of ReLU", layer, _by(shape), arrays, lowerings, OURS, reference)


def norm_contest(layer: str, shape: tuple[int, ...], batch: int) -> Contest:
    """Contest of group or layer normalization and all its gradients."""
    names, given = ["x", "scale", "bias"], {"epsilon": 1e-5}
    if len(shape) == 2:
        scale, rows, axes = shape[-1:], [-1, *shape], [0, 1]
        size, node = _by(shape), helper.make_node("LayerNormalization", names, ["y"], **given)
    else:
        channels, groups = shape[0], group_count(shape[0])
        scale, rows, axes = (channels, 1, 1), [-1, groups, prod(shape) // groups], [0, 2, 3]
        size, node = f"{_by(shape)}, {groups} groups", helper.make_node(GROUP, names, ["y"], groups=groups, **given)

    def compute(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if len(shape) == 2:
            return F.layer_norm(x, shape[-1:], scale, bias)
        return F.group_norm(x, groups, scale.flatten(), bias.flatten())

    arrays = _random(x=(batch, *shape), dy=(batch, *shape), scale=scale, bias=scale)
    operator = partial(_by_operator, rows=rows, shape=shape, axes=axes)
    lowerings = {
        OURS: _exported(node, arrays, names, forward=normalization.forward),
        **_appended({"LayerNormalization": operator}, arrays),
    }
    reference = _with_gradients(compute, arrays, names)
    return Contest("normalization and its gradient", layer, size, arrays, lowerings, OURS, reference)


def _by_operator(graph: Graph, *, rows: Sequence[int], shape: Sequence[int], axes: Sequence[int]) -> Sequence[str]:
    """LayerNormalization of rows [N, G, M]; the gradients of scale and bias are sums over `axes` of [N, *shape]."""
    ones, zeros = (graph.array(np.full(rows[-1], value, np.float32)) for value in (1, 0))
    normal, _, inverse = graph.ops("LayerNormalization", graph.reshape("x", rows), ones, zeros, outputs=3, epsilon=1e-5)
    whole = graph.reshape(normal, [-1, *shape])
    y = graph.op("Add", graph.op("Mul", whole, "scale"), "bias")
    grad_scale, grad_bias = graph.sum(graph.op("Mul", "dy", whole), axes), graph.sum("dy", axes)
    gradient = graph.reshape(graph.op("Mul", "dy", "scale"), rows)
    drift, share = (
        graph.op("ReduceMean", value, graph.ints(2)) for value in (gradient, graph.op("Mul", gradient, normal))
    )
    rest = graph.op("Sub", graph.op("Sub", gradient, drift), graph.op("Mul", normal, share))
    return y, graph.reshape(graph.op("Mul", rest, inverse), [-1, *shape]), grad_scale, grad_bias


def contests(layers: str, batch: int) -> dict[str, Callable[[], Iterable[Contest]]]:
    """Functions that make the rows of each layer that matches a pattern, by layer."""
    rows: dict[str, Callable[[], Iterable[Contest]]] = {
        layer: partial(convolution_contests, layer, conv, batch) for layer, conv in CONVOLUTIONS.items()
    }
    others = ((pooling_contest, POOLS), (relu_contest, RELUS), (norm_contest, NORMS))
    for contest, shapes in others:
        rows |= {layer: partial(_only, contest, layer, shape, batch) for layer, shape in shapes.items()}
    return {layer: make for layer, make in rows.items() if fnmatch(layer, layers)}


def _only(contest: Callable[..., Contest], layer: str, shape: Any, batch: int) -> list[Contest]:
    return [contest(layer, shape, batch)]


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _random(**shapes: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _graph(arrays: Mapping[str, NDArray[Any]]) -> Graph:
    """Graph that knows the arrays, and y, which has the shape of its gradient."""
    shapes: dict[str, Shape] = {name: array.shape for name, array in (*arrays.items(), ("y", arrays["dy"]))}
    return Graph(
        Trace({name: (Batch(), *shape[1:]) if name in BATCHES else shape for name, shape in shapes.items()}, {}, {})
    )


def _with_gradients(
    compute: Callable[..., Tensor], arrays: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> Callable[[], Sequence[Tensor]]:
    """Function that computes `compute` of some arrays in torch, and the gradients by them."""

    def run() -> Sequence[Tensor]:
        inputs = [torch.from_numpy(arrays[name]).requires_grad_() for name in names]
        y = compute(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, torch.from_numpy(arrays["dy"]))

    return run


def _exported(
    node: NodeProto,
    arrays: Mapping[str, NDArray[Any]],
    by: Sequence[str],
    *,
    forward: Callable[[Graph, NodeProto], None] | None = None,
) -> Lowering:
    """Lowering that the exporter appends for a node: its forward pass, if given, and the gradients of some inputs."""
    graph = _graph(arrays)
    if forward:
        forward(graph, node)
    gradients = differentiate(graph, [node], {"y": "dy"}, by)
    return graph, [*(["y"] if forward else []), *(gradients[name] for name in by)]


def _appended(
    lowerings: Mapping[str, Callable[[Graph], Sequence[str]]], arrays: Mapping[str, NDArray[Any]]
) -> dict[str, Lowering]:
    graphs = {name: _graph(arrays) for name in lowerings}
    return {name: (graphs[name], append(graphs[name])) for name, append in lowerings.items()}


def measure(contest: Contest, threads: int, repetitions: int) -> dict[str, Any]:
    """Median milliseconds of each lowering and of torch."""
    expected = [tensor.numpy() for tensor in contest.torch()]
    calls = {
        name: _runner(f"{contest.layer}, {contest.title}, {name}", *lowering, contest.arrays, expected, threads)
        for name, lowering in contest.lowerings.items()
    }
    ms = median_ms({**calls, TORCH: contest.torch}, repetitions)
    return {"table": contest.title, "layer": contest.layer, "size": contest.size, "chosen": contest.chosen, "ms": ms}


def _runner(
    what: str,
    graph: Graph,
    outputs: Sequence[str],
    arrays: Mapping[str, NDArray[np.float32]],
    expected: Sequence[NDArray[np.float32]],
    threads: int,
) -> Callable[[], object]:
    """Function that runs a graph on the arrays; its results are checked first."""
    nodes = needed(graph.nodes, outputs)
    used = {name: arrays[name] for name in arrays if any(name in node.input for node in nodes)}
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["batch", *array.shape[1:]] if name in BATCHES else array.shape
        )
        for name, array in used.items()
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    proto = helper.make_graph(nodes, "lowering", inputs, results, initializers_of(nodes, graph.initializers))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    session = InferenceSession(model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"])
    for found, right in zip(session.run(outputs, used), expected, strict=True):
        error = np.abs(found.reshape(right.shape) - right).max() / np.abs(right).max()
        if not error <= TOLERANCE:
            raise click.ClickException(f"{what}: expected torch's result, found one that is off by {error:.1e}")
    binding = session.io_binding()
    for name, array in used.items():
        binding.bind_cpu_input(name, array)
    for name in outputs:
        binding.bind_output(name)
    return partial(session.run_with_iobinding, binding)


def report(results: Mapping[str, Any]) -> str:
    """Tables of the results."""
    rows = results["rows"]
    parts = [f"milliseconds for a batch of {results['batch']} at {results['threads']} threads (medians)"]
    for title in dict.fromkeys(row["table"] for row in rows):
        parts += [title, _table([row for row in rows if row["table"] == title])]
    return "\n\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in dict.fromkeys(chain.from_iterable(row["ms"] for row in rows)) if name != TORCH]
    fastest = [min(ms for name, ms in row["ms"].items() if name != TORCH) for row in rows]
    chosen = [row["ms"][row["chosen"]] for row in rows]
    cells = [
        (
            row["layer"],
            row["size"],
            *(f"{row['ms'][name]:.2f}" if name in row["ms"] else "-" for name in (*names, TORCH)),
            row["chosen"],
            f"{own / best:.2f}",
        )
        for row, own, best in zip(rows, chosen, fastest, strict=True)
    ]
    sums = {"the fastest": sum(fastest), TORCH: sum(row["ms"][TORCH] for row in rows)}
    ratios = ", ".join(f"{sum(chosen) / total:.2f} times {name}" for name, total in sums.items())
    header = ("layer", "shape", *names, TORCH, "chosen", "chosen/fastest")
    return f"{table(header, cells)}\n\nall chosen lowerings together take {ratios}"


@click.command()
@click.option("--layers", default="*", show_default=True, help="Pattern of the layers to measure.")
@click.option("--batch", default=32, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--repetitions", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(
    layers: str, batch: int, threads: int, repetitions: int, json_file: Path | None, kept: Path | None, again: bool
) -> None:
    """Measure, print the tables, and write them as JSON."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    found = contests(layers, batch)
    if not found:
        raise click.BadParameter(f"expected a pattern that matches a layer, found {layers!r}", param_hint="--layers")
    settings = {"batch": batch, "threads": threads}

    def measure_layer(layer: str) -> list[dict[str, Any]]:
        return [measure(contest, threads, repetitions) for contest in found[layer]()]

    def all_of(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "rows": [*chain.from_iterable(parts.values())]}

    measured = measure_parts(
        {layer: partial(measure_layer, layer) for layer in found},
        lambda parts: report(all_of(parts)),
        settings={**settings, "repetitions": repetitions},
        kept=kept,
        again=again,
    )
    results = all_of(measured)
    click.echo(report(results))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
