"""Gradients of operators that only move entries: reshaping, cutting, joining, choosing and padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from export.gradients.graph import Graph, attributes
from export.gradients.rules import Gradients, rule
from export.tracing import Batch


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
    sizes = [size for name in node.input if isinstance(size := graph.shape(name)[axis], int)]
    if len(sizes) < len(node.input):
        raise NotImplementedError("a Concat along the batch")
    return graph.ops("Split", gradient, graph.ints(*sizes), outputs=len(sizes), axis=axis)


@rule("Tile")
def tile(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """The sum over all copies."""
    assert gradients[0] is not None
    shape, repeats = graph.shape(node.input[0]), graph.constant(node.input[1])
    if repeats is None or any(isinstance(dim, Batch) and n > 1 for dim, n in zip(shape, repeats, strict=True)):
        raise NotImplementedError("a Tile of the batch")
    copies = [size for dim, n in zip(shape, repeats, strict=True) for size in (int(n), dim)]
    apart = graph.reshape(gradients[0], copies)
    return [graph.reshape_like(graph.sum(apart, range(0, len(copies), 2)), node.input[0])]


@rule("GatherElements")
def gather_elements(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Every entry goes back to where it was taken; they add up."""
    assert gradients[0] is not None
    axis = attributes(node).get("axis", 0)
    zeros = TensorProto(dims=[1], data_type=TensorProto.FLOAT, float_data=[0.0])
    empty = graph.op("ConstantOfShape", graph.op("Shape", node.input[0]), value=zeros)
    return [graph.op("ScatterElements", empty, node.input[1], gradients[0], axis=axis, reduction="add")]


@rule("Trilu")
def trilu(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    assert gradients[0] is not None
    return [graph.op("Trilu", gradients[0], *node.input[1:], upper=attributes(node).get("upper", 1))]


@rule("Split")
def split(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    axis = attributes(node).get("axis", 0)
    parts = []
    for name, gradient in zip(node.output, gradients, strict=True):
        zeros = TensorProto(dims=[1], data_type=TensorProto.FLOAT, float_data=[0.0])
        parts.append(gradient or graph.op("ConstantOfShape", graph.op("Shape", name), value=zeros))
    return [graph.op("Concat", *parts, axis=axis), None]


def join_slices(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Put one Split in place of the slices that cut a value in pieces; its gradient is one Concat."""
    cuts: dict[tuple[str, int], dict[tuple[int, int], NodeProto]] = {}
    for node in nodes:
        if node.op_type == "Slice" and all(name == "" or graph.constant(name) is not None for name in node.input[1:]):
            bounds = [value.tolist() for value in _arguments(graph, node)]
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
    (gradient,) = gradients
    assert gradient is not None
    starts, ends, axes, steps = ([] if value is None else value.tolist() for value in _arguments(graph, node))
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = graph.shape(node.input[0])[axis]
        if (start, step) == (0, 1) and end >= np.iinfo(np.int32).max:
            continue
        if isinstance(size, Batch):
            raise NotImplementedError("a Slice along the batch")
        gradient = _scatter(graph, gradient, axis, np.arange(size)[slice(start, end, step)], size)
    return [gradient]


def _arguments(graph: Graph, node: NodeProto) -> list[NDArray[Any]]:
    constants = [graph.constant(name) if name else None for name in node.input[1:]]
    if constants[0] is None or constants[1] is None:
        raise NotImplementedError("a Slice whose bounds are no constants")
    rank = len(graph.shape(node.input[0]))
    starts, ends = constants[0], constants[1]
    axes = constants[2] if len(constants) > 2 and constants[2] is not None else np.arange(len(starts))
    steps = constants[3] if len(constants) > 3 and constants[3] is not None else np.ones(len(starts), np.int64)
    return [starts, ends, np.asarray(axes) % rank, steps]


@rule("Gather")
def gather(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Rows chosen by data add up in the table (an embedding); constant positions go back to where they were."""
    (gradient,), (table, indices) = gradients, node.input
    assert gradient is not None
    shape, axis = graph.shape(table), attributes(node).get("axis", 0) % len(graph.shape(table))
    size, positions = shape[axis], graph.constant(indices)
    if isinstance(size, Batch):
        raise NotImplementedError("a Gather along the batch")
    distinct = positions is not None and positions.ndim < 2 and len(np.unique(positions % size)) == positions.size
    if positions is None or not distinct:
        if axis != 0 or any(isinstance(dim, Batch) for dim in shape):
            raise NotImplementedError(
                "a Gather by data or of a position twice, but along the first axis of a parameter"
            )
        return [_add_rows(graph, gradient, indices, shape), None]
    if positions.ndim == 0:
        gradient = graph.op("Unsqueeze", gradient, graph.ints(axis))
    return [_scatter(graph, gradient, axis, np.atleast_1d(positions) % size, size), None]


def _add_rows(graph: Graph, gradient: str, indices: str, shape: tuple[Any, ...]) -> str:
    """Σ of the gradient's rows by index, [V, ...]."""
    width = int(np.prod(shape[1:]))
    rows = graph.op("Reshape", gradient, graph.ints(-1, width))
    index = graph.op("Expand", graph.op("Reshape", indices, graph.ints(-1, 1)), graph.ints(1, width))
    zeros = TensorProto(dims=[1], data_type=TensorProto.FLOAT, float_data=[0.0])
    empty = graph.op("ConstantOfShape", graph.ints(shape[0], width), value=zeros)
    summed = graph.op("ScatterElements", empty, index, rows, axis=0, reduction="add")
    return graph.reshape(summed, shape)


def _scatter(graph: Graph, gradient: str, axis: int, positions: NDArray[Any], size: int) -> str:
    """Put the entries along an axis at different positions of a longer one, zeros elsewhere."""
    count = len(positions)
    if count == size and (positions == np.arange(size)).all():
        return gradient
    if (np.diff(positions) == 1).all():
        before, after = int(positions[0]), size - int(positions[0]) - count
        return graph.op("Pad", gradient, graph.ints(before, after), "", graph.ints(axis))
    padded = graph.op("Pad", gradient, graph.ints(0, 1), "", graph.ints(axis))  # its last entry is a zero
    source = np.full(size, count, np.int64)
    source[positions] = np.arange(count)
    return graph.op("Gather", padded, graph.array(source), axis=axis)


@rule("Pad")
def pad(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    pads = graph.constant(node.input[1])
    if attributes(node).get("mode", "constant") != "constant" or pads is None:
        raise NotImplementedError("a Pad with anything but constants")
    rank = len(graph.shape(node.input[0]))
    axes = graph.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else np.arange(rank)
    assert axes is not None
    opposite = graph.array(-np.asarray(pads, np.int64))
    return [graph.op("Pad", gradient, opposite, "", graph.array(np.asarray(axes, np.int64)))]
