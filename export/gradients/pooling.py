"""Gradients of pooling. In max pooling each window gives its gradient to its first largest entry, as in torch.

onnxruntime's MaxPool is many times slower where it has to return the indices, so the maxima of windows of two or four
entries are found again, which is faster than to scatter the gradient to them; others are pooled with indices. With R
and P the 0/1 matrices that pick, for every position of the kernel, the rows and the columns that this position has in
all windows, R x P holds the k1 k2 candidates of every window as k1 k2 images of the output's size. In their order, each
candidate takes what is left of the gradient where it attains the maximum; Rᵀ and Pᵀ put that back in its place, and sum
where windows overlap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from export.forward.tracing import Batch
from export.gradients.builder import Graph, attributes
from export.gradients.rules import Gradients, rule
from export.gradients.windows import window_padding

_CANDIDATES = 4  # most candidates that are compared one by one; measured
_LOWEST, _HIGHEST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)  # 0 times 0, unlike infinities


@dataclass(frozen=True)
class _Axis:
    """One spatial axis; `pick` [positions · windows, padded size] picks the entries of all windows by position."""

    size: int
    before: int
    after: int
    positions: int
    windows: int
    pick: NDArray[np.float32]
    tiles: bool  # windows lie side by side from the first entry on

    @property
    def in_place(self) -> bool:
        """Whether `pick` changes nothing."""
        return np.array_equal(self.pick, np.eye(self.size))


def before_relu(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Exchange each Relu with the MaxPool that alone reads it: the maximum is the same, of fewer entries.

    So is the gradient: of a window without a positive entry it is zero either way.
    """
    count = Counter(name for node in nodes for name in node.input)
    relus = {node.output[0]: node for node in nodes if node.op_type == "Relu"}
    made = []
    for node in nodes:
        relu = relus.get(node.input[0]) if node.op_type == "MaxPool" and len(node.output) == 1 else None
        if relu is None or count[relu.output[0]] > 1:
            made.append(node)
            continue
        pool, pooled = NodeProto(), f"{node.output[0]}.signed"
        pool.CopyFrom(node)
        pool.input[0], pool.output[0] = relu.input[0], pooled
        graph.set_shape(pooled, graph.shape(node.output[0]))
        made += [pool, helper.make_node("Relu", [pooled], list(node.output), name=relu.name)]
    return made


def by_axis(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Replace each MaxPool of tiles of 2 x 2 with one of the pairs in every row and one of the rows.

    The first largest entry of a tile is the first largest of the first row that has the largest one.
    """
    made = []
    for node in nodes:
        if node.op_type != "MaxPool" or len(node.output) > 1 or not _pairs(graph, node, [2, 2]):
            made.append(node)
            continue
        by_row, (*images, height, width) = f"{node.output[0]}.rows", graph.shape(node.input[0])
        graph.set_shape(by_row, (*images, height, width // 2))  # type: ignore[operator]
        for kernel, x, y in (([1, 2], node.input[0], by_row), ([2, 1], by_row, node.output[0])):
            made.append(helper.make_node("MaxPool", [x], [y], name=y, kernel_shape=kernel, strides=kernel))
    return made


def _pairs(graph: Graph, node: NodeProto, kernel: list[int]) -> bool:
    """Whether the windows of a MaxPool are tiles of a given shape."""
    given = attributes(node)
    plain = not any(given.get("pads", ())) and {*given.get("dilations", ())} <= {1} and not given.get("ceil_mode", 0)
    plain = plain and given.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    static = not any(isinstance(size, Batch) for size in graph.shape(node.input[0])[1:])
    return plain and static and given["kernel_shape"] == kernel == given.get("strides")


def forward(graph: Graph, node: NodeProto) -> None:
    """Append a MaxPool of the forward graph, with its indices only where they are needed."""
    given, outputs, own = attributes(node), list(node.output), _indices(node)
    by_column = given.pop("storage_order", 0)
    if len(outputs) > 1 and by_column:  # these indices are of use to others, but not here
        others, outputs = outputs[1], outputs[:1]
        graph.ops("MaxPool", *node.input, outputs=1, storage_order=1, **given)
        graph.nodes[-1].output.append(others)
    if _by_indices(graph, node) and len(outputs) == 1:
        outputs.append(own)
    graph.nodes.append(helper.make_node("MaxPool", node.input, outputs, name=node.name, **given))


def _by_indices(graph: Graph, node: NodeProto) -> bool:
    """Whether a MaxPool's gradient is found by its indices."""
    if _is_global(graph, node):
        return False
    return len(graph.shape(node.input[0])) > 4 or prod(attributes(node)["kernel_shape"]) > _CANDIDATES


def _is_global(graph: Graph, node: NodeProto) -> bool:
    """Whether a MaxPool has a single window, which is the whole image."""
    given = attributes(node)
    padded = any(given.get("pads", ())) or given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return not padded and list(graph.shape(node.input[0])[2:]) == given["kernel_shape"]


def _indices(node: NodeProto) -> str:
    """Name of the indices that count the entries row by row."""
    by_row = len(node.output) > 1 and not attributes(node).get("storage_order", 0)
    return node.output[1] if by_row else f"{node.output[0]}.indices"


@rule("GlobalAveragePool")
def global_average_pool(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,), x = gradients, node.input[0]
    assert gradient is not None
    _, *pixels = graph.sizes(x, "channels or pixels of a GlobalAveragePool")
    share = graph.op("Mul", gradient, graph.scalar(1 / prod(pixels)))
    return [graph.op("Expand", share, graph.op("Shape", x))]


@rule("GlobalMaxPool")
def global_max_pool(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient to the first largest pixel of every channel."""
    gradient, x = gradients[0], node.input[0]
    assert gradient is not None
    return [_grad_of_one_window(graph, x, gradient)]


@rule("MaxPool")
def max_pool(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    gradient, x, y = gradients[0], node.input[0], node.output[0]
    assert gradient is not None
    channels, *pixels = graph.sizes(x, "channels or pixels of a MaxPool")
    if _is_global(graph, node):
        return [_grad_of_one_window(graph, x, gradient)]
    if _by_indices(graph, node):
        return [_grad_by_indices(graph, node, gradient)]
    if _pairs(graph, node, [1, 2]):
        return [_grad_of_pairs(graph, x, gradient, pixels[1])]
    rows, columns = _axes(graph, node, pixels)
    value = graph.op("Reshape", x, graph.ints(-1, channels, rows.size, columns.size))
    spare = rows.size - len(rows.pick)
    if rows.tiles and spare:
        value = graph.op("Slice", value, graph.ints(0), graph.ints(len(rows.pick)), graph.ints(2))
    pads = rows.before, columns.before, rows.after, columns.after
    if any(pads):
        value = graph.pad(value, 4, {2: pads[::2], 3: pads[1::2]}, graph.scalar(_LOWEST))
    if not columns.in_place:
        value = graph.op("MatMul", value, graph.array(columns.pick.T.copy()))
    height, axis = rows.positions, 2  # rows of tiles are split where they lie
    if rows.tiles:
        value = graph.op("Reshape", value, graph.ints(-1, channels, rows.windows, height, len(columns.pick)))
        axis = 3
    else:
        value = graph.op("MatMul", graph.array(rows.pick), value)
        value = graph.op("Reshape", value, graph.ints(-1, channels, height, rows.windows, len(columns.pick)))
    shape = graph.ints(-1, channels, rows.windows, columns.windows)
    largest, left = (graph.op("Reshape", array, shape) for array in (y, gradient))
    bands = [graph.op("Squeeze", band, graph.ints(axis)) for band in _split(graph, value, height, axis)]
    candidates = [candidate for band in bands for candidate in _split(graph, band, columns.positions, 3)]
    given = []
    for candidate in candidates[:-1]:
        attains = graph.op("Cast", graph.op("GreaterOrEqual", candidate, largest), to=TensorProto.FLOAT)
        given.append(graph.op("Mul", left, attains))
        left = graph.op("Sub", left, given[-1])
    given.append(left)
    rows_given = [_joined(graph, given[i : i + columns.positions], 3) for i in range(0, len(given), columns.positions)]
    grad_x = _joined(graph, [graph.op("Unsqueeze", row, graph.ints(axis)) for row in rows_given], axis)
    grad_x = graph.op("Reshape", grad_x, graph.ints(-1, channels, len(rows.pick), len(columns.pick)))
    if not rows.tiles:
        grad_x = graph.op("MatMul", graph.array(rows.pick.T.copy()), grad_x)
    if not columns.in_place:
        grad_x = graph.op("MatMul", grad_x, graph.array(columns.pick))
    if rows.tiles and spare:
        grad_x = graph.pad(grad_x, 4, {2: (0, spare)})
    if any(pads):
        starts, ends = pads[:2], (rows.before + rows.size, columns.before + columns.size)
        grad_x = graph.op("Slice", grad_x, graph.ints(*starts), graph.ints(*ends), graph.ints(2, 3))
    return [graph.reshape_like(grad_x, x)]


def _grad_of_one_window(graph: Graph, x: str, gradient: str) -> str:
    """Gradient of channels each of which is a single window."""
    channels, *pixels = graph.sizes(x, "channels or pixels of a MaxPool")
    flat = graph.op("Reshape", x, graph.ints(-1, channels, prod(pixels)))
    place = graph.op("ArgMax", flat, axis=2)
    given = graph.op("Reshape", gradient, graph.ints(-1, channels, 1))
    return graph.reshape_like(graph.op("ScatterElements", graph.zeros_like(flat), place, given, axis=2), x)


def _grad_of_pairs(graph: Graph, x: str, gradient: str, width: int) -> str:
    """Gradient of the pairs (a, b) in rows of x, from a - b: that of a if this is not negative, that of b otherwise."""
    pairs = width // 2
    subtract, place = np.zeros((width, pairs), np.float32), np.zeros((2, pairs, width), np.float32)
    for pair in range(pairs):
        subtract[2 * pair : 2 * pair + 2, pair] = 1, -1
        place[0, pair, 2 * pair : 2 * pair + 2] = 0, 1  # of the whole gradient
        place[1, pair, 2 * pair : 2 * pair + 2] = 1, -1  # of that of a
    ahead = graph.op("HardSigmoid", graph.op("MatMul", x, graph.array(subtract)), alpha=_HIGHEST, beta=1.0)
    both = graph.op("Concat", gradient, graph.op("Mul", gradient, ahead), axis=3)
    return graph.op("MatMul", both, graph.array(place.reshape(2 * pairs, width)))


def _grad_by_indices(graph: Graph, node: NodeProto, gradient: str) -> str:
    """Gradient by the indices, which count the entries of the whole input."""
    x = node.input[0]
    flat = graph.zeros(graph.op("Reshape", graph.op("Size", x), graph.ints(1)))
    places, given = (graph.op("Reshape", value, graph.ints(-1)) for value in (_indices(node), gradient))
    return graph.reshape_like(graph.op("ScatterElements", flat, places, given, reduction="add"), x)


def _axes(graph: Graph, node: NodeProto, sizes: list[int]) -> tuple[_Axis, _Axis]:
    given: dict[str, Any] = attributes(node)
    rank, counts = len(sizes), graph.sizes(node.output[0], "windows of a MaxPool")[1:]
    strides, dilations = (given.get(name, [1] * rank) for name in ("strides", "dilations"))
    pads, _ = window_padding(given, sizes, counts, given["kernel_shape"])
    axes = []
    for size, windows, positions, stride, dilation, before in zip(
        sizes, counts, given["kernel_shape"], strides, dilations, pads, strict=True
    ):
        entries = dilation * np.arange(positions)[:, None] + stride * np.arange(windows)
        after = max(int(entries.max()) + 1 - before - size, 0)
        pick = np.eye(before + size + after, dtype=np.float32)[entries.reshape(-1)]
        tiles = not before + after and np.array_equal(entries.T.reshape(-1), np.arange(entries.size))
        axes.append(_Axis(size, before, after, positions, windows, pick, tiles))
    single = _Axis(1, 0, 0, 1, 1, np.ones((1, 1), np.float32), True)
    return (single, axes[0]) if rank == 1 else (axes[0], axes[1])


def _split(graph: Graph, value: str, count: int, axis: int) -> list[str]:
    return graph.ops("Split", value, outputs=count, axis=axis, num_outputs=count) if count > 1 else [value]


def _joined(graph: Graph, values: list[str], axis: int) -> str:
    return graph.op("Concat", *values, axis=axis) if len(values) > 1 else values[0]
