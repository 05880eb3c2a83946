"""Random numbers of a model's own draws, such as the masks of drop path.

In the engine onnxruntime they are determined by a seed: entry i of draw number k is a hash of i, k and the seed, as in
`dropout`; a normal number takes two. onnxruntime-training takes no seed but for its Dropout, so there they are made of
coins that a Dropout tosses. `Draws` gives torch the numbers of a seed, so that an export with them can be verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from export.forward.graph import DRAWING
from export.forward.tracing import Trace
from export.gradients import Graph, refusing
from export.gradients.builder import attributes, initializers_of
from export.step.dropout import hashes, hashes_in_torch
from fedpara_edge.errors import InputError

_FIRST = 1 << 20  # above the numbers of dropouts
_COINS = "draw."
_BITS = 24  # of a number in [0, 1), which float32 holds


Uniform = Callable[[Graph, str, int], str]
"""Function that appends numbers in [0, 1), multiples of 2^-24, to a graph and returns their name.

It takes the graph, the name of their shape, and a number that no other call for the graph has.
"""


def from_seed(seed: str) -> Uniform:
    """Numbers determined by an int64 scalar of the graph."""
    return partial(_hashed, seed=seed)


def from_coins(graph: Graph, shape: str, number: int) -> str:
    """Numbers whose bits a Dropout draws."""
    many = graph.op("Concat", graph.ints(_BITS), graph.op("ReduceProd", shape, keepdims=1), axis=0)
    filled = graph.op("Expand", graph.scalar(number + 1), many)  # equal Dropouts would be one
    tossed = graph.op("Dropout", filled, graph.scalar(0.5), graph.array(np.array(True)))
    bits = graph.op("Cast", graph.op("Greater", tossed, graph.scalar(0.0)), to=TensorProto.FLOAT)
    values = graph.array(2.0 ** -np.arange(1, _BITS + 1, dtype=np.float32)[None])
    return graph.define(f"{_COINS}{number}", "Reshape", graph.op("MatMul", values, bits), shape)


def with_coins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Model that draws from coins.

    Raises:
        NoGradientError: It draws numbers that are not float32.
    """

    def toss(graph: Graph, node: NodeProto, number: int) -> bool:
        if node.op_type not in DRAWING:
            return False
        with refusing(node):
            draw(graph, node, number, from_coins)
        return True

    return _replaced(model, toss, "coins")


def with_seed(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Model that draws from a seed, where one from `with_coins` or made of it draws from coins."""

    def take(graph: Graph, node: NodeProto, _: int) -> bool:
        if not node.output[0].startswith(_COINS):
            return False
        number, name = int(node.output[0].removeprefix(_COINS)), graph.array(np.array(seed, np.int64))
        graph.define(node.output[0], "Identity", _hashed(graph, node.input[1], number, name))
        return True

    return _replaced(model, take, "seed")


def _replaced(model: onnx.ModelProto, replace: Callable[[Graph, NodeProto, int], bool], prefix: str) -> onnx.ModelProto:
    """Copy of a model in which a function has appended others in place of those nodes for which it is true.

    It takes the graph to append to, the node, and the number of nodes that have been replaced.
    """
    changed, graph, number = onnx.ModelProto(), Graph(Trace({}, {}, {}), prefix), 0
    changed.CopyFrom(model)
    for node in model.graph.node:
        if replace(graph, node, number):
            number += 1
        else:
            graph.nodes.append(node)
    del changed.graph.node[:]
    changed.graph.node.extend(graph.nodes)
    changed.graph.initializer.extend(initializers_of(graph.nodes, graph.initializers))
    return changed


def draw(graph: Graph, node: NodeProto, number: int, uniform: Uniform) -> None:
    """Append draw `number` of a graph in place of a node that draws.

    Args:
        graph: Graph to append to.
        node: Node of one of the operators `export.forward.graph.DRAWING`.
        number: Number of this draw, which no other draw of the graph has.
        uniform: Source of the numbers.

    Raises:
        NotImplementedError: The numbers are not float32.
    """
    given, y = attributes(node), node.output[0]
    kind = given.get("dtype", 0)
    if graph.dtype(y) != np.float32 or kind not in (0, TensorProto.FLOAT):
        raise NotImplementedError(f"a {node.op_type} of {graph.dtype(y)}")
    shape = graph.op("Shape", node.input[0]) if node.input else graph.ints(*given["shape"])
    first = uniform(graph, shape, 2 * number)
    if node.op_type == "Bernoulli":
        graph.define(y, "Cast", graph.op("Less", first, node.input[0]), to=TensorProto.FLOAT)
        return
    if node.op_type.startswith("RandomUniform"):
        low, high = given.get("low", 0.0), given.get("high", 1.0)
        scaled = first if high - low == 1 else graph.op("Mul", first, graph.scalar(high - low))
        graph.define(y, "Add", scaled, graph.scalar(low))
        return
    angle = graph.op("Mul", uniform(graph, shape, 2 * number + 1), graph.scalar(2 * math.pi))
    positive = graph.op("Sub", graph.scalar(1.0), first)
    radius = graph.op("Sqrt", graph.op("Mul", graph.op("Log", positive), graph.scalar(-2.0)))
    normal = graph.op("Mul", radius, graph.op("Cos", angle))
    scaled = graph.op("Mul", normal, graph.scalar(given.get("scale", 1.0)))
    graph.define(y, "Add", scaled, graph.scalar(given.get("mean", 0.0)))


def _hashed(graph: Graph, shape: str, number: int, seed: str) -> str:
    size = graph.op("ReduceProd", shape, keepdims=0)
    hashed = hashes(graph, size, _FIRST + number, seed)
    high = graph.op("Div", hashed, graph.array(np.array(1 << 32 - _BITS, np.int64)))
    scaled = graph.op("Mul", graph.op("Cast", high, to=TensorProto.FLOAT), graph.scalar(2.0**-_BITS))
    return graph.op("Reshape", scaled, shape)


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which torch draws what the graph draws with a seed.

    Args:
        seed: The seed, a number or, to be on the device where numbers are drawn, an int64 tensor [].
        dropping: Whether dropouts drop, by masks of the seed as well, which are other ones than in the graph.
        twins: Whether a batch is one row twice, so that what has two rows gets the numbers of one, twice.

    Attributes:
        is_used: Whether anything was drawn, or dropped.
    """

    def __init__(self, seed: int | torch.Tensor, *, dropping: bool = False, twins: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._twins = torch.tensor(seed) if isinstance(seed, int) else seed, twins
        self._number, self._dropouts = 0, _Dropouts(self._seed, dropping=dropping)

    @property
    def is_used(self) -> bool:
        return self._number > 0 or self._dropouts.number > 0

    def __enter__(self) -> Draws:
        self._number = self._dropouts.number = 0
        self._dropouts.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._dropouts.__exit__(*error)  # type: ignore[no-untyped-call]

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
        like = target[:1] if self._twins and target.shape[:1] == (2,) else target
        first, second = (
            _uniform_in_torch(like, 2 * self._number + stream, self._seed).expand(target.shape) for stream in range(2)
        )
        self._number += 1
        with torch.no_grad():
            return target.copy_(_DRAWN[name](first, second, *rest))


def _uniform_in_torch(like: torch.Tensor, number: int, seed: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), multiples of 2^-24, in double precision if the tensor is."""
    hashed = hashes_in_torch(like.numel(), _FIRST + number, seed) >> (32 - _BITS)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (hashed.to(dtype) * 2.0**-_BITS).reshape(like.shape)


def _uniform_within(first: torch.Tensor, _: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * first


def _of_two(first: torch.Tensor, _: torch.Tensor, p: float | torch.Tensor = 0.5) -> torch.Tensor:
    return (first < p).to(first.dtype)


def _normal(first: torch.Tensor, second: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.sqrt(-2 * torch.log(1 - first)) * torch.cos(2 * math.pi * second)


_DRAWN: dict[str, Callable[..., torch.Tensor]] = {
    "rand": _uniform_within,
    "rand_like": _uniform_within,
    "uniform_": _uniform_within,
    "bernoulli": _of_two,
    "bernoulli_": _of_two,
    "randn": _normal,
    "randn_like": _normal,
    "normal_": _normal,
}
"""Functions of two uniform tensors and of an operator's arguments but its target."""


class _Dropouts(TorchFunctionMode):
    """Context in which `dropout` drops by masks of a seed, or gives its input.

    Attributes:
        number: Number of dropouts that dropped.
    """

    def __init__(self, seed: torch.Tensor, *, dropping: bool) -> None:
        super().__init__()
        self._seed, self._dropping, self.number = seed, dropping, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func not in (torch.nn.functional.dropout, torch.dropout):
            return func(*args, **(kwargs or {}))
        return self._dropped(*args, **{_FORMER.get(name, name): value for name, value in (kwargs or {}).items()})

    def _dropped(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        del inplace
        if not self._dropping or not training or p == 0:
            return x
        hashed = hashes_in_torch(x.numel(), self.number, self._seed)
        self.number += 1
        kept = (hashed < round((1 - p) * 2**32)).reshape(x.shape)
        return x * kept / (1 - p) if p < 1 else x * 0


_FORMER = {"input": "x", "train": "training"}
"""Names of the arguments of `dropout` in torch, where they are others."""
