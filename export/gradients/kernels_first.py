"""Composing of the kernels of convolutions in the layout [9, O, I], in which every product is a plain matrix product.

Of W = X · (Y · T), with X [O, R], Y [I, R] and T [R, R, 3, 3], the product at each position of the kernel is
X (T Yᵀ) [O, I]: only T, Y and the like are transposed, never a weight or its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, helper

from export.forward.tracing import Shape
from export.gradients.builder import Graph, static

POSITIONS = 9
"""Entries of a 3x3 kernel."""


@dataclass
class KernelsFirst:
    """Layout [9, O, I] of weights [O, I, 3, 3].

    Args:
        graph: Graph that knows the shapes.
        makers: Nodes of the forward pass by output.
        nodes: List to append the nodes to that make the weights.
    """

    graph: Graph
    makers: dict[str, NodeProto]
    nodes: list[NodeProto]

    def __post_init__(self) -> None:
        self._moved: dict[str, str | None] = {}

    def composed(self, weight: str) -> str | None:
        """Weight composed in this layout; None for one that is not composed."""
        if weight not in self._moved:
            self._moved[weight] = self._composed(weight)
        return self._moved[weight]

    def _composed(self, weight: str) -> str | None:
        """Weight by what computes it: entry by entry, or as a product of factors."""
        shape, maker = self.graph.shape(weight), self.makers.get(weight)
        if maker is None:
            return None
        if maker.op_type in ("Mul", "Add", "Tanh"):
            shapes = [self.graph.shape(name) for name in maker.input]
            if any(each not in (shape, ()) for each in shapes):
                return None
            inputs = [
                self.composed(name) or self._transposed(name) if each == shape else name
                for name, each in zip(maker.input, shapes, strict=True)
            ]
            return self._op(maker.op_type, self._shape(shape), *inputs)
        product = self.makers.get(maker.input[0]) if maker.op_type == "Reshape" else None
        if product is None or product.op_type != "MatMul":
            return None
        left, right = product.input
        filters, channels, *_ = static(shape, "weights")
        if len(self.graph.shape(left)) != 2 or self.graph.shape(left)[0] != filters:
            return None
        return self._op("MatMul", self._shape(shape), left, self._inner(right, channels))

    def _inner(self, value: str, channels: int) -> str:
        """Right factor [R, I · 9] as [9, R, I]; if T by Y, from T [R, S, 9] as [9, R, S]."""
        graph = self.graph
        (rank,) = static(graph.shape(value)[:1], "ranks")
        source = self.makers.get(value)
        product = self.makers.get(source.input[0]) if source is not None and source.op_type == "Reshape" else None
        if product is not None and product.op_type == "MatMul":
            y, t = product.input
            shape = graph.shape(t)
            if len(shape) == 3 and shape[::2] == (rank, POSITIONS) and graph.shape(y) == (channels, shape[1]):
                first = self._op("Transpose", (POSITIONS, *shape[:2]), t, perm=[2, 0, 1])
                turned = self._op("Transpose", (shape[1], channels), y, perm=[1, 0])
                return self._op("MatMul", (POSITIONS, rank, channels), first, turned)
        apart = self._op("Reshape", (rank, channels, POSITIONS), value, graph.ints(rank, channels, POSITIONS))
        return self._op("Transpose", (POSITIONS, rank, channels), apart, perm=[2, 0, 1])

    def _transposed(self, weight: str) -> str:
        filters, channels, *_ = static(self.graph.shape(weight), "weights")
        flat = (filters, channels, POSITIONS)
        apart = self._op("Reshape", flat, weight, self.graph.ints(*flat))
        return self._op("Transpose", self._shape(flat), apart, perm=[2, 0, 1])

    def _shape(self, shape: Shape) -> Shape:
        return (POSITIONS, *shape[:2])

    def _op(self, operator: str, shape: Shape, *inputs: str, **attributes: Any) -> str:
        name = self.graph.name(operator)
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        self.graph.set_shape(name, shape)
        return name
