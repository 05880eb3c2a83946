"""Trace of a forward graph, obtained by running it: the shape of every value, and the values that never change.

The graph runs on batches of two sizes. A dimension that is the same in both is static, one that grows with the batch is
a `Batch`; an integer or other value that neither the input nor a trained parameter can change, and that is the same in
both, is a constant. The nodes that compute shapes (Shape, Gather, Concat...) thus need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.apart import apart
from export.complaints import complaint
from export.forward.batchnorm import in_plain_operators
from export.forward.graph import DRAWING
from fedpara_edge.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Dimension with `factor` entries for each example of the batch."""

    factor: int = 1


Dim = int | Batch
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Trace:
    """Shapes, dtypes and constants among the values of a graph.

    Attributes:
        shapes: Shapes of all values, by name.
        dtypes: Dtypes (numpy) of all values, by name.
        constants: Values that never change, by name.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype[Any]]
    constants: Mapping[str, NDArray[Any]]


def trace(model: onnx.ModelProto, examples: Mapping[str, NDArray[Any]], trained: Collection[str]) -> Trace:
    """Run a forward graph on the first two and the first three of some examples.

    Args:
        model: Model with its parameters as initializers; what else it takes is the batch.
        examples: Raw inputs [N, ...] by name, with N at least 3.
        trained: Names of the parameters that training changes.

    Raises:
        InputError: The graph does not run in onnxruntime, or a dimension grows with the batch, but not in proportion.
    """
    observed = onnx.ModelProto()
    observed.CopyFrom(in_plain_operators(model))
    own = {name for node in model.graph.node for name in node.output if name}
    names = [name for node in observed.graph.node for name in node.output if name in own]
    del observed.graph.output[:]
    observed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    batches = [{name: array[:size] for name, array in examples.items()} for size in (2, 3)]
    try:
        results = apart(_observe, observed.SerializeToString(), names, batches, _changing(model.graph, trained))
    except Exception as error:  # the exceptions of onnxruntime have no common base
        raise InputError(
            f"model: expected one that onnxruntime runs on any batch, found {complaint(error)}; "
            "take the batch size from x.shape[0], not from len(x)"
        ) from error
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    two, three = (
        {name: _Observed(value.shape, value.dtype) for name, value in (batch | initializers).items()} | found
        for batch, found in zip(batches, results, strict=True)
    )
    constants = {
        name: value.content
        for name, value in two.items()
        if value.content is not None and np.array_equal(value.content, three[name].content)
    }
    constants |= {name: value for name, value in initializers.items() if name not in trained}
    shapes = {name: _shape(name, value.shape, three[name].shape) for name, value in two.items()}
    return Trace(shapes, {name: value.dtype for name, value in two.items()}, constants)


class _Observed(NamedTuple):
    """What is known of a value after a run, with its content only if neither input nor trained parameters change it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    content: NDArray[Any] | None = None


def _observe(
    model: bytes, names: Sequence[str], batches: Sequence[Mapping[str, NDArray[Any]]], changing: Collection[str]
) -> list[dict[str, _Observed]]:
    """Values of a graph by name, for each batch."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [
        {
            name: _Observed(value.shape, value.dtype, None if name in changing else value)
            for name, value in zip(names, session.run(names, batch), strict=True)
            if isinstance(value, np.ndarray)
        }
        for batch in batches
    ]


def _shape(name: str, two: tuple[int, ...], three: tuple[int, ...]) -> Shape:
    dims: list[Dim] = []
    for a, b in zip(two, three, strict=True):
        if a != b and 3 * a != 2 * b:
            raise InputError(
                f"value {name!r}: expected sizes in proportion to the batch, found {a} for 2 examples and {b} for 3"
            )
        dims.append(a if a == b else Batch(a // 2))
    return tuple(dims)


def _changing(graph: onnx.GraphProto, trained: Collection[str]) -> set[str]:
    """Values that depend on the content of the input, on a trained parameter, or on chance."""
    changing = {*(info.name for info in graph.input), *trained}
    for node in graph.node:
        random = node.op_type == "Dropout" or node.op_type in DRAWING
        if random or (node.op_type not in ("Shape", "Size") and changing & set(node.input)):
            changing.update(node.output)
    return changing
