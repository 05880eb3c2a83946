"""Gradients of operators that only move entries: reshaping, slicing, joining, repeating and padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from export.forward.tracing import Batch, Shape
from export.gradients.builder import Graph, attributes, static
from export.gradients.rules import Gradients, rule


@rule("Reshape", "Squeeze", "Unsqueeze", "Flatten")
def reshape(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    assert gradients[0] is not None
    return [graph.reshape_like(gradients[0], node.input[0]), None]


@rule("Transpose")
def transpose(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    assert gradients[0] is not None
    rank = len(graph.shape(node.input[0]))
    perm = attributes(node).get("perm", list(range(rank))[::-1])
    return [graph.transpose(gradients[0], [int(axis) for axis in np.argsort(perm)])]


@rule("Expand")
def expand(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    assert gradients[0] is not None
    return [graph.sum_to(gradients[0], graph.shape(node.output[0]), graph.shape(node.input[0])), None]


@rule("Concat")
def concat(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,), axis = gradients, attributes(node)["axis"]
    assert gradient is not None
    axis %= len(graph.shape(node.output[0]))
    sizes = [size for name in node.input if isinstance(size := graph.shape(name)[axis], int)]
    if len(sizes) == len(node.input):
        cuts = graph.ints(*sizes)
    else:
        cuts = graph.op("Concat", *(graph.op("Shape", n, start=axis, end=axis + 1) for n in node.input), axis=0)
    return graph.ops("Split", gradient, cuts, outputs=len(node.input), axis=axis)


@rule("Tile")
def tile(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Sum of the gradient over all copies."""
    assert gradients[0] is not None
    shape, repeats = graph.shape(node.input[0]), graph.constant(node.input[1])
    if repeats is None:
        raise NotImplementedError("a Tile whose number of copies is not constant")
    copies = [size for dim, n in zip(shape, repeats, strict=True) for size in (int(n), dim)]
    apart = graph.reshape(gradients[0], copies)
    return [graph.reshape_like(graph.sum(apart, range(0, len(copies), 2)), node.input[0])]


@rule("Trilu")
def trilu(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    assert gradients[0] is not None
    return [graph.op("Trilu", gradients[0], *node.input[1:], upper=attributes(node).get("upper", 1))]


@rule("Split")
def split(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    axis = attributes(node).get("axis", 0)
    parts = [gradient or graph.zeros_like(name) for name, gradient in zip(node.output, gradients, strict=True)]
    return [graph.op("Concat", *parts, axis=axis), None]


def join_slices(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Replace the slices that cut a value into pieces with one Split, whose gradient is one Concat."""
    cuts: dict[tuple[str, int], dict[tuple[int, int], NodeProto]] = {}
    for node in nodes:
        if node.op_type == "Slice" and all(name == "" or graph.constant(name) is not None for name in node.input[1:]):
            bounds = [np.asarray(values).tolist() for values in _arguments(graph, node)]
            size = graph.shape(node.input[0])[bounds[2][0]] if len(bounds[2]) == 1 else None
            if isinstance(size, int) and bounds[3] == [1]:
                start, end, _ = slice(bounds[0][0], bounds[1][0]).indices(size)
                cuts.setdefault((node.input[0], bounds[2][0]), {}).setdefault((start, end), node)
    replaced: dict[str, NodeProto | None] = {}
    for (value, axis), pieces in cuts.items():
        ends = [0, *(end for _, end in sorted(pieces))]
        if len(pieces) > 1 and sorted(pieces) == list(pairwise([*ends[:-1], graph.shape(value)[axis]])):
            outputs = [pieces[bounds].output[0] for bounds in sorted(pieces)]
            first, *_ = pieces.values()
            sizes = graph.ints(*(end - start for start, end in pairwise(ends)))
            replaced |= dict.fromkeys(outputs)
            replaced[first.output[0]] = helper.make_node("Split", [value, sizes], outputs, name=first.name, axis=axis)
    return [made for node in nodes if (made := replaced.get(node.output[0], node)) is not None]


@rule("Slice")
def slice_(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    gradient, x = gradients[0], node.input[0]
    assert gradient is not None
    starts, ends, axes, steps = _arguments(graph, node)
    assert axes is not None
    for number, axis in enumerate(axes):
        size, start, end, step = graph.shape(x)[axis], *(_entry(values, number) for values in (starts, ends, steps))
        if (start, step) == (0, 1) and end is not None and end >= np.iinfo(np.int32).max:
            continue
        if isinstance(size, Batch) or start is None or end is None or step is None:
            gradient = _put_back_by_bounds(graph, gradient, axis, node, number)
        else:
            gradient = put_back(graph, gradient, axis, np.arange(size)[slice(start, end, step)], graph.shape(x))
    return [gradient]


def _arguments(graph: Graph, node: NodeProto) -> list[NDArray[Any] | None]:
    """Starts, ends, axes and steps; None for those that are not constant."""
    names, rank = _names(node), len(graph.shape(node.input[0]))
    starts, ends, axes, steps = (graph.constant(name) for name in names)
    (count,) = static(graph.shape(names[0]), "bounds of a Slice") if starts is None else starts.shape
    if names[2] and axes is None:
        raise NotImplementedError("a Slice along axes that are not constant")
    listed = np.arange(count) if axes is None else axes % rank
    return [starts, ends, listed, steps if names[3] else np.ones(count, np.int64)]


def _names(node: NodeProto) -> list[str]:
    """Names of starts, ends, axes and steps; "" for those left out."""
    return [*node.input[1:], "", ""][:4]


def _entry(values: NDArray[Any] | None, number: int) -> int | None:
    return None if values is None else int(values[number])


def _put_back_by_bounds(graph: Graph, gradient: str, axis: int, node: NodeProto, number: int) -> str:
    """`put_back` for a Slice along an axis whose size or bounds are only known at run time."""
    starts, ends, _, steps = _names(node)
    cut = graph.ints(number), graph.ints(number + 1)
    start, end, step = (graph.op("Slice", name, *cut) if name else graph.ints(1) for name in (starts, ends, steps))
    zero, one = (graph.array(np.array(value, np.int64)) for value in (0, 1))
    size, count = (graph.op("Shape", value, start=axis, end=axis + 1) for value in (node.input[0], gradient))
    scalars = [graph.op("Squeeze", value) for value in (size, count)]
    everywhere, taken = (graph.op("Range", zero, value, one) for value in scalars)
    positions = graph.op("Slice", everywhere, start, end, graph.ints(0), step)
    nowhere = graph.op("Expand", count, size)
    source = graph.op("ScatterElements", nowhere, positions, taken)
    padded = graph.pad(gradient, len(graph.shape(node.input[0])), {axis: (0, 1)})  # its last entry is a zero
    return graph.op("Gather", padded, source, axis=axis)


def put_back(graph: Graph, gradient: str, axis: int, positions: NDArray[Any], shape: Shape) -> str:
    """Put the entries along an axis at distinct positions of that of a larger shape, with zeros elsewhere."""
    (size,), rank, count = static([shape[axis]], "positions"), len(shape), len(positions)
    if count == size and (positions == np.arange(size)).all():
        return gradient
    if (np.diff(positions) == 1).all():
        before = int(positions[0]) if count else 0
        return graph.pad(gradient, rank, {axis: (before, size - before - count)})
    padded = graph.pad(gradient, rank, {axis: (0, 1)})  # its last entry is a zero
    source = np.full(size, count, np.int64)
    source[positions] = np.arange(count)
    return graph.op("Gather", padded, graph.array(source), axis=axis)


@rule("DepthToSpace")
def depth_to_space(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    gradient, given = gradients[0], attributes(node)
    assert gradient is not None
    block = given["blocksize"]
    if given.get("mode", "DCR") == "DCR":
        return [graph.op("SpaceToDepth", gradient, blocksize=block)]
    channels, height, width = graph.sizes(node.input[0], "channels or pixels of a DepthToSpace")
    apart = graph.op("Reshape", gradient, graph.ints(-1, channels // block**2, height, block, width, block))
    return [graph.reshape_like(graph.transpose(apart, [0, 1, 3, 5, 2, 4]), node.input[0])]


@rule("SpaceToDepth")
def space_to_depth(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    assert gradients[0] is not None
    return [graph.op("DepthToSpace", gradients[0], blocksize=attributes(node)["blocksize"])]


@rule("Pad")
def pad(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient of what was kept, and of the copies of it that were added around it."""
    gradient, mode = gradients[0], attributes(node).get("mode", "constant")
    assert gradient is not None
    (pads, axes), shape = padding(graph, node), graph.shape(node.input[0])
    if mode == "constant":
        around = {axis: (-before, -after) for axis, (before, after) in zip(axes, pads, strict=True)}
        return [graph.pad(gradient, len(shape), around)]
    for axis, (before, after) in zip(axes, pads, strict=True):
        if not before and not after:
            continue
        size = shape[axis]
        if isinstance(size, Batch) or min(before, after) < 0 or max(before, after) > size:
            raise NotImplementedError(f"a Pad by {before} and {after} of {size} entries with mode {mode}")
        gradient = _fold_padding(graph, gradient, axis, shape, (before, after), mode)
    return [gradient]


def padding(graph: Graph, node: NodeProto) -> tuple[list[tuple[int, int]], list[int]]:
    """Entries that a Pad adds before and after, for each of the axes that it lists, and these axes.

    Raises:
        NotImplementedError: They are not constant.
    """
    pads, rank = graph.constant(node.input[1]), len(graph.shape(node.input[0]))
    axes = graph.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else np.arange(rank)
    if pads is None or axes is None:
        raise NotImplementedError("a Pad with anything but constants")
    before, after = pads.reshape(2, -1).tolist()
    return list(zip(before, after, strict=True)), [int(axis) % rank for axis in axes]


def padded_entries(size: int, before: int, after: int, mode: str) -> NDArray[Any]:
    """Entry of an axis that each entry of the padded axis is a copy of, by the mode of a Pad.

    >>> padded_entries(4, 2, 1, "reflect").tolist(), padded_entries(4, 2, 1, "wrap").tolist()
    ([2, 1, 0, 1, 2, 3, 2], [2, 3, 0, 1, 2, 3, 0])
    """
    return np.pad(np.arange(size), (before, after), mode=mode)  # type: ignore[call-overload,no-any-return]


def _fold_padding(graph: Graph, gradient: str, axis: int, shape: Shape, around: tuple[int, int], mode: str) -> str:
    """Gradient along one axis of a padded shape, that of every copy added to that of its original."""
    (size,), (before, after) = static([shape[axis]], "sizes"), around
    entries = padded_entries(size, before, after, mode)
    pieces = graph.ops("Split", gradient, graph.ints(before, size, after), outputs=3, axis=axis)
    total = pieces[1]
    for piece, copies in ((pieces[0], entries[:before]), (pieces[2], entries[before + size :])):
        if not len(copies):
            continue
        if len(set(copies.tolist())) == 1:
            piece, copies = graph.sum(piece, [axis], keepdims=True), copies[:1]
        elif copies[0] > copies[-1]:
            backwards = graph.ints(len(copies) - 1), graph.ints(-len(copies) - 1), graph.ints(axis), graph.ints(-1)
            piece, copies = graph.op("Slice", piece, *backwards), copies[::-1]
        total = graph.op("Add", total, put_back(graph, piece, axis, copies, shape))
    return total
