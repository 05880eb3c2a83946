"""Forward pass of a bundle, recovered from a graph that evaluates it: raw input in, outputs out.

`eval_model.onnx` has every trained tensor as an input under its own name; `eval_step.onnx` has one vector of weights,
from which a Slice and a Reshape take each tensor. Here the tensors become initializers, and the loss and dropout are
removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fedpara_edge.errors import InputError, WrongBundleError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.formats.bundle import ONNXRUNTIME_FILES, ORT_TRAINING_FILES, Bundle

EVAL_MODEL, EVAL_STEP = ORT_TRAINING_FILES[1], ONNXRUNTIME_FILES[1]
SOURCES = (EVAL_MODEL, EVAL_STEP)
"""Graphs that hold the forward pass, the preferred one first: the second may be lowered for one runtime."""


def inference_graph(bundle: Bundle, tensors: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """Forward pass of a bundle with given weights, still composed of their factors.

    Args:
        bundle: Verified bundle.
        tensors: All tensors that training changes (shared and personal) or that updates hold, by name, float32.

    Returns:
        Model from the bundle's inputs to its outputs, with all trained and frozen tensors as initializers by name.

    Raises:
        InputError: The bundle has none of the graphs.
        WrongBundleError: The graph lacks an input, an output or a tensor of the manifest.
    """
    manifest = bundle.manifest
    source = next((name for name in SOURCES if name in manifest.files), None)
    if source is None:
        raise InputError(f"{bundle.path}: expected {' or '.join(SOURCES)}, found neither; export the bundle again")
    model = onnx.load_from_string(bundle.read_graph(source))
    graph = model.graph
    layout = manifest.layout
    values = {tensor.name: tensor.name for tensor in layout.with_role("shared", "personal")}
    if source == EVAL_STEP:
        values = {**_pieces(graph, "weights", layout.trained), **_pieces(graph, "statistics", layout.statistics)}
    held = {tensor.name for tensor in layout.held}
    input_names = [spec.name for spec in manifest.interface.inputs]
    output_names = [spec.name for spec in manifest.interface.outputs]
    inputs = [info for info in graph.input if info.name in input_names]
    outputs = [info for info in graph.output if info.name in output_names]
    known = {info.name for info in graph.input} | {name for node in graph.node for name in node.output}
    whole = [info.name for info in inputs] == input_names and [info.name for info in outputs] == output_names
    if not whole or {*values.values(), *held} != tensors.keys() or not known >= values.keys():
        raise WrongBundleError(
            f"{bundle.file(source)}: expected {', '.join(map(repr, (*input_names, *output_names)))} and the tensors of "
            "the manifest, found other values; export the bundle again"
        )
    replace(graph.input, inputs)
    replace(graph.output, outputs)
    replace(graph.node, [node for node in graph.node if values.keys().isdisjoint(node.output)])
    redirect(graph, values)
    graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name) for name, value in tensors.items()
    )
    _bypass_identities(graph)
    prune(graph)
    return model


def prune(graph: onnx.GraphProto) -> None:
    """Remove, in place, the nodes, optional outputs and initializers that no output of the graph needs."""
    needed = {info.name for info in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        used = [name if name in needed else "" for name in node.output]
        while not used[-1]:
            used.pop()
        replace(node.output, used)
        needed.update(node.input)
        kept.append(node)
    replace(graph.node, reversed(kept))
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])
    del graph.value_info[:]


def redirect(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Make every node that reads a value in `names` read the value that it maps to instead, in place."""
    for node in graph.node:
        replace(node.input, [names.get(name, name) for name in node.input])


def replace(field: Any, entries: Iterable[Any]) -> None:
    """Replace the content of a repeated field of a protobuf message."""
    content = list(entries)
    del field[:]
    field.extend(content)


def _pieces(graph: onnx.GraphProto, vector: str, tensors: Sequence[TensorSpec]) -> dict[str, str]:
    """Names of the tensors by the values that hold them, where Slices cut up the vector of them."""
    starts = np.cumsum([0, *(tensor.size for tensor in tensors)])
    names = {int(start): tensor.name for start, tensor in zip(starts, tensors, strict=False)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    pieces = {
        node.output[0]: names.get(int(numpy_helper.to_array(constants[node.input[1]])[0]), "")
        for node in graph.node
        if node.op_type == "Slice" and node.input[0] == vector
    }
    shaped = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Reshape"}
    return {shaped[piece]: name for piece, name in pieces.items() if piece in shaped}


def _bypass_identities(graph: onnx.GraphProto) -> None:
    """Remove the nodes that only pass a value on: Identity, and Dropout where nothing is trained."""
    outputs = {info.name for info in graph.output}
    produced = {name for node in graph.node for name in node.output}
    names: dict[str, str] = {}
    kept = []
    for node in graph.node:
        source = names.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type not in ("Identity", "Dropout"):
            kept.append(node)
        elif node.output[0] not in outputs:
            names[node.output[0]] = source
        elif source in produced - outputs:  # the node that made it makes the output instead
            names |= {name: node.output[0] for name, other in names.items() if other == source}
            names[source] = node.output[0]
        else:
            kept.append(helper.make_node("Identity", [source], [node.output[0]], name=node.name))
    replace(graph.node, kept)
    redirect(graph, names)
    for node in graph.node:
        replace(node.output, [names.get(name, name) for name in node.output])
