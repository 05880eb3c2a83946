"""Graph of a training step under construction: the nodes appended so far, and what is known of their values."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from export.forward.tracing import Batch, Dim, Shape, Trace


class Graph:
    """Graph under construction: nodes and constants, appended in the order of execution.

    Args:
        trace: Shapes, dtypes and constants of the forward values.
        prefix: Beginning of the names that it makes up.
        direct: Whether convolutions stay Convs of one image after the other, as the model has them.

    Attributes:
        wanted: Forward values whose gradient is requested.
        moved: Values that are composed in another layout, by the name of the forward value that they stand for.
    """

    def __init__(self, trace: Trace, prefix: str = "step", *, direct: bool = False) -> None:
        self.direct = direct
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, NDArray[Any]] = dict(trace.constants)
        self.wanted: set[str] = set()
        self.moved: dict[str, str] = {}
        self._shapes: dict[str, Shape] = dict(trace.shapes)
        self._dtypes = trace.dtypes
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._prefix, self._numbers = prefix, itertools.count(1)

    def branch(self) -> Graph:
        """Graph with nodes of its own that shares everything else, such as for the inside of an If."""
        inner = copy.copy(self)
        inner.nodes = []
        return inner

    def shape(self, value: str) -> Shape:
        """Shape of a forward value (values of the gradient are not traced).

        Raises:
            NotImplementedError: The value is not a tensor.
        """
        if value not in self._shapes:
            raise NotImplementedError("a sequence of tensors")
        return self._shapes[value]

    def sizes(self, value: str, what: str) -> list[int]:
        """Shape of a forward value without its first axis.

        Raises:
            NotImplementedError: A size grows with the batch; `what` says what the sizes are.
        """
        return static(self.shape(value)[1:], what)

    def dtype(self, value: str) -> np.dtype[Any]:
        """Dtype of a forward value; float32 for those that were not traced."""
        return self._dtypes.get(value, np.dtype(np.float32))

    def differentiable(self, value: str) -> bool:
        """Whether a value holds real numbers, not truth values or integers."""
        return self.dtype(value).kind == "f"

    def set_shape(self, value: str, shape: Shape) -> None:
        """Record the shape of a value that was not traced."""
        self._shapes[value] = shape

    def constant(self, value: str) -> NDArray[Any] | None:
        """Content of a value that never changes; None for any other value."""
        return self.initializers.get(value)

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output and return its name."""
        return self.ops(operator, *inputs, outputs=1, **attributes)[0]

    def ops(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs and return their names."""
        names = [self.name(operator) for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=names[0], **attributes))
        return names

    def define(self, value: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node whose output gets a given name, and return that name."""
        self.nodes.append(helper.make_node(operator, list(inputs), [value], name=value, **attributes))
        return value

    def name(self, what: str) -> str:
        """New name for a node and its output."""
        return f"{self._prefix}.{what.lower()}.{next(self._numbers)}"

    def array(self, values: NDArray[Any]) -> str:
        """Store a constant, equal ones only once, and return its name."""
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._stored:
            self._stored[key] = self.initialize(self.name("constant"), values)
        return self._stored[key]

    def initialize(self, name: str, values: NDArray[Any]) -> str:
        """Store a constant under a given name, and return that name."""
        self.initializers[name] = values
        return name

    def ints(self, *values: int) -> str:
        """Constant int64 vector.

        Raises:
            NotImplementedError: A value is a size that grows with the batch.
        """
        return self.array(np.array(static(values, "sizes"), np.int64))

    def scalar(self, value: float) -> str:
        """Constant float32 scalar."""
        return self.array(np.array(value, np.float32))

    def zeros_like(self, value: str) -> str:
        """Zeros in the shape of a value."""
        return self.zeros(self.op("Shape", value))

    def zeros(self, shape: str) -> str:
        """Zeros, float32, in a shape given by the name of an int64 vector."""
        zero = TensorProto(dims=[1], data_type=TensorProto.FLOAT, float_data=[0.0])
        return self.op("ConstantOfShape", shape, value=zero)

    def reshape(self, value: str, shape: Sequence[Dim]) -> str:
        """`value` in another shape.

        Raises:
            NotImplementedError: More than one dimension grows with the batch.
        """
        if sum(isinstance(dim, Batch) for dim in shape) > 1:
            raise NotImplementedError("a shape with the batch in two dimensions")
        return self.op("Reshape", value, self.ints(*(-1 if isinstance(dim, Batch) else dim for dim in shape)))

    def reshape_like(self, value: str, other: str) -> str:
        """`value` in the shape of a forward value."""
        shape = self.shape(other)
        if sum(isinstance(dim, Batch) for dim in shape) > 1:
            return self.op("Reshape", value, self.op("Shape", other))
        return self.reshape(value, shape)

    def transpose(self, value: str, perm: Sequence[int]) -> str:
        """`value` with its axes in the order of `perm`."""
        return self.op("Transpose", value, perm=list(perm))

    def pad(self, value: str, rank: int, around: Mapping[int, tuple[int, int]], fill: str = "") -> str:
        """Value of some rank with entries added before and after along some axes, or removed where these are negative.

        The Pad lists all axes: through one that lists some, onnxruntime moves a Transpose as if it listed all.
        """
        before, after = zip(*(around.get(axis, (0, 0)) for axis in range(rank)), strict=True)
        return self.op("Pad", value, self.ints(*before, *after), *([fill] if fill else []))

    def sum(self, value: str, axes: Iterable[int], *, keepdims: bool = False) -> str:
        """Sum over some axes."""
        return self.op("ReduceSum", value, self.ints(*axes), keepdims=int(keepdims))

    def sum_to(self, gradient: str, shape: Shape, target: Shape) -> str:
        """Undo broadcasting: sum a gradient of `shape` to the shape that was broadcast to it."""
        extra = len(shape) - len(target)
        axes = [a for a, dim in enumerate(shape) if a < extra or (target[a - extra] == 1 and dim != 1)]
        if not axes:
            return gradient
        summed = self.sum(gradient, axes)
        ones = [a - extra for a in axes if a >= extra]
        return self.op("Unsqueeze", summed, self.ints(*ones)) if ones else summed


def static(sizes: Iterable[Dim], what: str) -> list[int]:
    """Sizes, none of which may grow with the batch.

    Raises:
        NotImplementedError: A size grows; `what` says what the sizes are, in the plural.
    """
    found = list(sizes)
    if any(isinstance(size, Batch) for size in found):
        raise NotImplementedError(f"{what} that grow with the batch")
    return [int(size) for size in found]  # type: ignore[arg-type]


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node, as Python values."""
    return {attribute.name: _value(attribute) for attribute in node.attribute}


def _value(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def needed(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Nodes that some outputs depend on, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(_inputs(node))
    return kept[::-1]


def initializers_of(nodes: Iterable[NodeProto], arrays: Mapping[str, NDArray[Any]]) -> list[onnx.TensorProto]:
    """Constants that some nodes use, as initializers."""
    used = {name for node in nodes for name in _inputs(node)}
    return [numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used]


def _inputs(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, including those that its subgraphs read."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _inputs(inner)
