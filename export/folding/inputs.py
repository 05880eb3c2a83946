"""Inputs as a model expects them, drawn at random: around the mean that its graph subtracts, with the deviation.

An input goes through at most a Cast, a Mul and an Add with constants before the model sees it. It is drawn so that what
comes out of these is N(0, 1); uint8 is rounded and clipped, and uniform where it is only scaled to [0, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from fedpara_edge.formats.interface import ArraySpec, Interface

_SEED = 0

Constants = tuple[NDArray[Any], NDArray[Any]]


def random_inputs(interface: Interface, rows: int, model: onnx.ModelProto | None = None) -> dict[str, NDArray[Any]]:
    """Random inputs by name, always the same.

    Args:
        interface: Interface of the model.
        rows: Number of rows.
        model: Model in float32 with its constants as initializers; None for inputs of which only the shapes matter.
    """
    generator = np.random.default_rng(_SEED)
    none = np.ones(()), np.zeros(())
    return {
        spec.name: _draw(spec, rows, generator, none if model is None else normalization(model.graph, spec.name))
        for spec in interface.inputs
    }


def normalization(graph: onnx.GraphProto, name: str) -> Constants:
    """Scale and shift by which a graph first maps an input x to x · scale + shift; 1 and 0 if it does not."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    scale, shift = np.ones(()), np.zeros(())
    while True:
        readers = [node for node in graph.node if name in node.input]
        if len(readers) != 1:
            return scale, shift
        (node,) = readers
        if node.op_type in ("Mul", "Add"):
            other = next((each for each in node.input if each != name), name)
            if other not in constants:
                return scale, shift
            value = numpy_helper.to_array(constants[other]).astype(np.float64)
            if node.op_type == "Mul" and (shift.any() or not value.all()):
                return scale, shift
            scale, shift = (scale * value, shift) if node.op_type == "Mul" else (scale, shift + value)
        elif node.op_type != "Cast":
            return scale, shift
        name = node.output[0]


def _draw(spec: ArraySpec, rows: int, generator: np.random.Generator, constants: Constants) -> NDArray[Any]:
    shape = (rows, *spec.shape)
    scale, shift = constants
    plain = not shift.any() and np.allclose(scale, 1 / 255, rtol=1e-6)
    if spec.dtype in ("bool", "int64") or (spec.dtype == "uint8" and (plain or np.all(scale == 1))):
        limit = {"bool": 2, "uint8": 256}.get(spec.dtype) or spec.classes or 256
        return generator.integers(0, limit, shape).astype(spec.dtype)
    raw = (generator.standard_normal(shape, np.float32) - shift) / scale
    return np.clip(np.rint(raw), 0, 255).astype(np.uint8) if spec.dtype == "uint8" else raw.astype(np.float32)
