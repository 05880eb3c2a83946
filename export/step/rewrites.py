"""Rewrites of the nodes of a forward pass, before they are put into a step."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto, helper

from export.forward.tracing import Batch, Trace
from export.gradients import Graph, refusing
from export.gradients.builder import attributes, static

_OPTIONAL_OUTPUTS = ("Dropout", "LayerNormalization", "MaxPool")  # except the first


def with_static_shape(graph: Graph, node: NodeProto, known: Trace) -> NodeProto:
    """Reshape with a constant target in place of one computed from the batch, whose single unknown size becomes -1."""
    if node.op_type != "Reshape" or graph.constant(node.input[1]) is not None:
        return node
    shape = known.shapes[node.output[0]]
    if sum(isinstance(dim, Batch) for dim in shape) != 1:
        return node
    target = graph.ints(*(-1 if isinstance(dim, Batch) else dim for dim in shape))
    return helper.make_node("Reshape", [node.input[0], target], list(node.output), name=node.name)


def without_unused(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Nodes without the optional outputs that none of them reads."""
    del graph
    used = {name for node in nodes for name in node.input}
    kept = []
    for node in nodes:
        count = len(node.output)
        while node.op_type in _OPTIONAL_OUTPUTS and count > 1 and node.output[count - 1] not in used:
            count -= 1
        trimmed = NodeProto()
        trimmed.CopyFrom(node)
        del trimmed.output[count:]
        kept.append(trimmed)
    return kept


def without_sequences(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Nodes with Slices in place of a split to a sequence whose entries are taken one by one."""
    sources = {node.output[0]: node for node in nodes if node.op_type == "SplitToSequence"}
    kept = []
    for node in nodes:
        source = sources.get(node.input[0]) if node.op_type == "SequenceAt" else None
        with refusing(node):
            kept.append(node if source is None else _slice_in_place_of(graph, node, source) or node)
    return kept


def _slice_in_place_of(graph: Graph, node: NodeProto, source: NodeProto) -> NodeProto | None:
    """Slice for one entry of a sequence; None where its bounds are not constant."""
    given, index = attributes(source), graph.constant(node.input[1])
    sizes = graph.constant(source.input[1]) if len(source.input) > 1 else None
    if sizes is None or index is None:
        return None
    shape, number = graph.shape(node.output[0]), int(index)
    axis = given.get("axis", 0) % len(shape)
    start = number * int(sizes) if sizes.ndim == 0 else int(sizes[:number].sum())
    (size,) = static(shape[axis : axis + 1], "parts of a SplitToSequence")
    bounds = graph.ints(start), graph.ints(start + size), graph.ints(axis)
    return helper.make_node("Slice", [source.input[0], *bounds], list(node.output), name=node.name)
