"""A contest of lowerings: graphs that compute the same from the same arrays, checked against torch, then timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import numpy as np
import torch
from device import median_ms
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from device_runtime.engines.ort import InferenceSession, session_options
from export.forward.graph import IR_VERSION, OPSET
from export.forward.tracing import Batch, Shape, Trace
from export.gradients import Graph, differentiate
from export.gradients.builder import initializers_of, needed

TOLERANCE = 1e-3
"""Largest error, relative to the largest entry: sums of up to 32768 products in float32, in several orders."""
BATCHES = ("x", "y", "dy")
"""Names of the arrays whose first axis is the batch."""
TORCH = "torch"

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


def random_arrays(**shapes: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    """Normal arrays of some shapes, always the same."""
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def graph_of(arrays: Mapping[str, NDArray[Any]]) -> Graph:
    """Graph that knows the arrays, and y, which has the shape of its gradient."""
    shapes: dict[str, Shape] = {name: array.shape for name, array in (*arrays.items(), ("y", arrays["dy"]))}
    return Graph(
        Trace({name: (Batch(), *shape[1:]) if name in BATCHES else shape for name, shape in shapes.items()}, {}, {})
    )


def with_gradients(
    compute: Callable[..., Tensor], arrays: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> Callable[[], Sequence[Tensor]]:
    """Function that computes `compute` of some arrays in torch, and the gradients by them."""

    def run() -> Sequence[Tensor]:
        inputs = [torch.from_numpy(arrays[name]).requires_grad_() for name in names]
        y = compute(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, torch.from_numpy(arrays["dy"]))

    return run


def exported(
    node: NodeProto,
    arrays: Mapping[str, NDArray[Any]],
    by: Sequence[str],
    *,
    forward: Callable[[Graph, NodeProto], None] | None = None,
) -> Lowering:
    """Lowering that the exporter appends for a node: its forward pass, if given, and the gradients of some inputs."""
    graph = graph_of(arrays)
    if forward:
        forward(graph, node)
    gradients = differentiate(graph, [node], {"y": "dy"}, by)
    return graph, [*(["y"] if forward else []), *(gradients[name] for name in by)]


def appended(
    lowerings: Mapping[str, Callable[[Graph], Sequence[str]]], arrays: Mapping[str, NDArray[Any]]
) -> dict[str, Lowering]:
    """Lowerings that functions append to a graph that knows the arrays, by name."""
    graphs = {name: graph_of(arrays) for name in lowerings}
    return {name: (graphs[name], append(graphs[name])) for name, append in lowerings.items()}


def measure(contest: Contest, threads: int, repetitions: int) -> dict[str, Any]:
    """Median milliseconds of each lowering and of torch."""
    torch.set_num_threads(threads)
    expected = [tensor.numpy() for tensor in contest.torch()]
    calls = {
        name: _runner(f"{contest.layer}, {contest.title}, {name}", *lowering, contest.arrays, expected, threads)
        for name, lowering in contest.lowerings.items()
    }
    ms = median_ms({**calls, TORCH: contest.torch}, repetitions)
    row = {"table": contest.title, "layer": contest.layer, "size": contest.size, "threads": threads}
    return {**row, "chosen": contest.chosen, "ms": ms}


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
