"""Random numbers determined by a seed: those of a model's own draws, such as the masks of drop path.

Entry i of draw number k is a hash of i, k and the seed, as in `dropout`; a normal number takes two. `Draws` gives torch
the numbers that the graph draws, so that an export with them can be verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from export.gradients import Graph
from export.gradients.builder import attributes
from export.step.dropout import hashes, hashes_in_numpy
from fedpara_edge.errors import InputError

_FIRST = 1 << 20  # above the numbers of dropouts
_BITS = 24  # of a number in [0, 1), which float32 holds


def draw(graph: Graph, node: NodeProto, number: int, seed: str) -> None:
    """Append draw `number` of a graph in place of a node that draws.

    Args:
        graph: Graph to append to.
        node: Node of one of the operators `export.forward.graph.DRAWING`.
        number: Number of this draw, which no other draw of the graph has.
        seed: Name of an int64 scalar of the graph.

    Raises:
        NotImplementedError: The numbers are not float32.
    """
    given, y = attributes(node), node.output[0]
    kind = given.get("dtype", 0)
    if graph.dtype(y) != np.float32 or kind not in (0, TensorProto.FLOAT):
        raise NotImplementedError(f"a {node.op_type} of {graph.dtype(y)}")
    shape = graph.op("Shape", node.input[0]) if node.input else graph.ints(*given["shape"])
    uniform = _uniform(graph, shape, 2 * number, seed)
    if node.op_type == "Bernoulli":
        graph.define(y, "Cast", graph.op("Less", uniform, node.input[0]), to=TensorProto.FLOAT)
        return
    if node.op_type.startswith("RandomUniform"):
        low, high = given.get("low", 0.0), given.get("high", 1.0)
        scaled = uniform if high - low == 1 else graph.op("Mul", uniform, graph.scalar(high - low))
        graph.define(y, "Add", scaled, graph.scalar(low))
        return
    angle = graph.op("Mul", _uniform(graph, shape, 2 * number + 1, seed), graph.scalar(2 * math.pi))
    positive = graph.op("Sub", graph.scalar(1.0), uniform)
    radius = graph.op("Sqrt", graph.op("Mul", graph.op("Log", positive), graph.scalar(-2.0)))
    normal = graph.op("Mul", radius, graph.op("Cos", angle))
    scaled = graph.op("Mul", normal, graph.scalar(given.get("scale", 1.0)))
    graph.define(y, "Add", scaled, graph.scalar(given.get("mean", 0.0)))


def _uniform(graph: Graph, shape: str, number: int, seed: str) -> str:
    """Numbers in [0, 1), multiples of 2^-24."""
    size = graph.op("ReduceProd", shape, keepdims=0)
    hashed = hashes(graph, size, _FIRST + number, seed)
    high = graph.op("Div", hashed, graph.array(np.array(1 << 32 - _BITS, np.int64)))
    scaled = graph.op("Mul", graph.op("Cast", high, to=TensorProto.FLOAT), graph.scalar(2.0**-_BITS))
    return graph.op("Reshape", scaled, shape)


def _uniform_in_numpy(shape: tuple[int, ...], number: int, seed: int) -> NDArray[np.float64]:
    hashed = hashes_in_numpy(math.prod(shape), _FIRST + number, seed)
    uniform: NDArray[np.float64] = (hashed >> np.uint64(32 - _BITS)).astype(np.float64) * 2.0**-_BITS
    return uniform.reshape(shape)


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which torch draws what the graph draws with a seed, and drops nothing.

    Args:
        seed: The seed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._number, self._without_dropout = seed, 0, _WithoutDropout()

    def __enter__(self) -> Draws:
        self._number = 0
        self._without_dropout.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._without_dropout.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in _DRAWN:
            raise InputError(
                f"model: expected random numbers that are uniform, normal or of two values, found {name}; draw them "
                "from torch.rand (nothing was written)"
            )
        return self._drawn(name, *args, **(kwargs or {}))

    def _drawn(self, name: str, *args: Any, generator: Any = None, **options: Any) -> torch.Tensor:
        """Result of a drawing operator."""
        del generator
        drawn, *rest = args
        if name in ("rand", "randn"):  # of a size
            target = torch.empty(drawn, **options)
        elif name.endswith("_"):
            target = drawn
        else:
            target = torch.empty_like(drawn, **options)
        if name == "bernoulli" and not rest:  # of the probabilities that give the shape
            rest = [drawn]
        shape = tuple(target.shape)
        uniforms = [_uniform_in_numpy(shape, 2 * self._number + stream, self._seed) for stream in range(2)]
        self._number += 1
        values = _DRAWN[name](*uniforms, *(np.asarray(argument) for argument in rest))
        with torch.no_grad():
            return target.copy_(torch.from_numpy(np.asarray(values)))


def _uniform_within(first: NDArray[Any], _: NDArray[Any], low: float = 0.0, high: float = 1.0) -> NDArray[Any]:
    return low + (high - low) * first


def _of_two(first: NDArray[Any], _: NDArray[Any], p: float | NDArray[Any] = 0.5) -> NDArray[Any]:
    return (first < p) * 1.0


def _normal(first: NDArray[Any], second: NDArray[Any], mean: float = 0.0, std: float = 1.0) -> NDArray[Any]:
    normal: NDArray[Any] = np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * math.pi * second)
    return mean + std * normal


_DRAWN: dict[str, Callable[..., NDArray[Any]]] = {
    "rand": _uniform_within,
    "rand_like": _uniform_within,
    "uniform_": _uniform_within,
    "bernoulli": _of_two,
    "bernoulli_": _of_two,
    "randn": _normal,
    "randn_like": _normal,
    "normal_": _normal,
}
"""Functions of two uniform arrays and of an operator's arguments but its target."""


class _WithoutDropout(TorchFunctionMode):
    """Context in which `dropout` gives its input."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in (torch.nn.functional.dropout, torch.dropout):
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
