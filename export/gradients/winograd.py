"""Convolutions with 3x3 kernels on small images by Winograd's minimal filtering, with 16 products for 4 x 9.

Of every tile of 2 x 2 outputs, the 4 x 4 inputs that it sees and the 9 entries of a kernel are turned into 16
frequencies, in which the convolution is a product: for x [N, I, *S] and w [9, O, I], with y [N, O, *T],

    V = B x [16, tiles · N, I]    U = K w [16, O, I]    y = A (V Uᵀ)

B, K and A are constant matrices, the first and the last of which also place the tiles and their padding. So all three
products of a training step are 16 plain matrix products, in whose layout channels come last and the positions of a
kernel first. `fuse` composes weights in that layout, so that neither they nor their gradients are ever transposed.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308), F(2x2, 3x3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from export.gradients.builder import Graph, static
from export.gradients.geometry import Convolution
from export.gradients.kernels_first import POSITIONS, KernelsFirst
from export.gradients.rules import Gradients, rule

WINOGRAD = "WinogradConv"
"""Operator of the nodes that `fuse` makes: x [N, I, *S], w, and often a bias [O]; their attributes are pads.

A weight w is [9, O, I] if it is composed, and [O, I, 3, 3] if not. The nodes exist only between the forward graph and
its lowering."""

LIMITS = ((36, 32), (64, 64))
"""Pairs of the most pixels that x may have and the fewest channels that both x and y must have; measured."""
LEAST_SAVING = 1.2
"""Least quotient of the products of a direct convolution and these, which is 2.25 for even sizes; measured."""

_FREQUENCIES = 16
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_KERNELS = np.kron(_KERNEL, _KERNEL)  # K
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)


@dataclass(frozen=True)
class _Filter:
    """Constant matrix [16 · tiles, pixels] that is the product of one for each axis, such as B or Aᵀ.

    Args:
        axes: Matrices [4, tiles, pixels] along the two axes.
    """

    axes: tuple[NDArray[np.float32], NDArray[np.float32]]

    @property
    def tiles(self) -> int:
        """Number of tiles of an image."""
        return prod(axis.shape[1] for axis in self.axes)

    @property
    def pixels(self) -> int:
        """Number of pixels of an image."""
        return prod(axis.shape[2] for axis in self.axes)

    def append(self, graph: Graph, *, transposed: bool = False) -> str:
        """Append the matrix or its transpose, as a product that the runtime takes when it loads the graph.

        So files are small. It has constants of its own, or a pass over the graph would make one of what is computed
        with equal matrices in the forward and the backward pass. That of a single tile is stored whole, as the runtime
        makes one of equal constants that are as small as its axes.
        """
        first, second = (np.moveaxis(axis, 2, 0) if transposed else axis for axis in self.axes)
        factors = first[:, None, :, None, :, None], second[None, :, None, :, None, :]
        shape = [_FREQUENCIES * self.tiles, self.pixels]
        shape = shape[::-1] if transposed else shape
        if self.tiles == 1:
            return graph.initialize(graph.name("Constant"), (factors[0] * factors[1]).reshape(shape))
        product = graph.op("Mul", *(graph.initialize(graph.name("Constant"), factor) for factor in factors))
        return graph.reshape(product, shape)


def is_faster(facts: Convolution) -> bool:
    """Whether a convolution and its gradients are computed this way."""
    if facts.kernel != [3, 3] or facts.groups > 1 or {*facts.strides, *facts.dilations} != {1}:
        return False
    channels, tiles = min(facts.channels, facts.filters), prod(-(-out // 2) for out in facts.out)
    if POSITIONS * prod(facts.out) < LEAST_SAVING * _FREQUENCIES * tiles:
        return False
    return any(prod(facts.size) <= pixels and channels >= fewest for pixels, fewest in LIMITS)


def fuse(
    graph: Graph, nodes: Sequence[NodeProto], applies: Callable[[Convolution], bool] = is_faster
) -> list[NodeProto]:
    """Replace the convolutions to which it applies with `WINOGRAD` nodes, and compose their weights anew."""
    makers = {name: node for node in nodes for name in node.output}
    made: list[NodeProto] = []
    layout = KernelsFirst(graph, makers, made)
    for node in nodes:
        facts = _facts_of(graph, node) if node.op_type == "Conv" else None
        if facts is None or not applies(facts):
            made.append(node)
            continue
        weight = node.input[1]
        if (moved := layout.composed(weight)) is not None:
            graph.moved[weight] = moved
        inputs = [node.input[0], graph.moved.get(weight, weight), *node.input[2:]]
        pads = [*facts.before, *facts.after]
        made.append(helper.make_node(WINOGRAD, inputs, list(node.output), name=node.name, pads=pads))
    return made


def _facts_of(graph: Graph, node: NodeProto) -> Convolution | None:
    """Facts about a Conv; None for one whose own lowering refuses it."""
    try:
        return Convolution.from_conv(graph, node)
    except NotImplementedError:
        return None


def forward(graph: Graph, node: NodeProto) -> None:
    """Append a `WINOGRAD` node of the forward graph, with its output under the same name."""
    (x, weight, *bias), y = node.input, node.output[0]
    filters, channels, place, collect = _facts(graph, node)
    size = graph.sizes(y, "pixels")[1:]
    kernels, tiles = _kernels(graph, weight), _tiles(graph, x, channels, place)
    products = graph.op("MatMul", tiles, graph.transpose(kernels, [0, 2, 1]))
    flat = graph.op("Reshape", products, graph.ints(_FREQUENCIES * collect.tiles, -1))
    found = graph.op("MatMul", collect.append(graph, transposed=True), flat)
    found = graph.op("Reshape", found, graph.ints(prod(size), -1, filters))
    if bias and bias[0]:
        found = graph.op("Add", found, bias[0])
    graph.define(y, "Reshape", graph.transpose(found, [1, 2, 0]), graph.ints(-1, filters, *size))


@rule(WINOGRAD)
def winograd(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradients by the transposed matrices; those of the weights are products over all tiles."""
    (gradient,), (x, weight, *bias) = gradients, node.input
    assert gradient is not None
    filters, channels, place, collect = _facts(graph, node)
    slopes = _pixels_first(graph, gradient, filters, collect.pixels)
    grad_x = grad_weight = grad_bias = None
    if bias and bias[0] in graph.wanted:
        grad_bias = graph.sum(graph.op("Reshape", slopes, graph.ints(-1, filters)), [0])
    found = graph.op("MatMul", collect.append(graph), slopes)
    found = graph.op("Reshape", found, graph.ints(_FREQUENCIES, -1, filters))
    if x in graph.wanted:
        tiles = graph.op("MatMul", found, _kernels(graph, _again(graph, weight)))
        tiles = graph.op("Reshape", tiles, graph.ints(_FREQUENCIES * place.tiles, -1))
        pixels = graph.op("MatMul", place.append(graph, transposed=True), tiles)
        apart = graph.op("Reshape", pixels, graph.ints(place.pixels, -1, channels))
        grad_x = graph.reshape_like(graph.transpose(apart, [1, 2, 0]), x)
    if weight in graph.wanted:
        kernels = graph.op("MatMul", graph.transpose(found, [0, 2, 1]), _tiles(graph, x, channels, place))
        flat = graph.op("Reshape", kernels, graph.ints(_FREQUENCIES, -1))
        if len(graph.shape(weight)) == 3:
            flat = graph.op("MatMul", graph.array(_KERNELS.T.copy()), flat)
        else:
            flat = graph.op("MatMul", graph.transpose(flat, [1, 0]), graph.array(_KERNELS))
        grad_weight = graph.reshape_like(flat, weight)
    return [grad_x, grad_weight, grad_bias]


def _pixels_first(graph: Graph, value: str, channels: int, pixels: int) -> str:
    """A value [N, C, *S] as [pixels, N · C]."""
    apart = graph.op("Reshape", value, graph.ints(-1, channels, pixels))
    return graph.op("Reshape", graph.transpose(apart, [2, 0, 1]), graph.ints(pixels, -1))


def _kernels(graph: Graph, weight: str) -> str:
    """U [16, O, I].

    The backward pass computes U and V again, by constants of its own, so that no pass over the graph makes one of both:
    they are larger than w and x, and would be in memory for all layers at once. So would w where it is a mere product.
    """
    own, shape = graph.initialize(graph.name("Constant"), _KERNELS), graph.shape(weight)
    if len(shape) == 3:
        rows = graph.op("Reshape", weight, graph.ints(POSITIONS, -1))
    else:
        rows = graph.transpose(graph.op("Reshape", weight, graph.ints(-1, POSITIONS)), [1, 0])
    return graph.reshape(graph.op("MatMul", own, rows), [_FREQUENCIES, *(shape[1:] if len(shape) == 3 else shape[:2])])


def _again(graph: Graph, weight: str) -> str:
    """A weight, multiplied once more if it is a product of two values; others as they are."""
    maker = next((node for node in graph.nodes if weight in node.output), None)
    if maker is None or maker.op_type != "Mul":
        return weight
    again = graph.op("Mul", *maker.input[::-1])  # the other way round, as equal nodes would be made one
    graph.set_shape(again, graph.shape(weight))
    return again


def _tiles(graph: Graph, x: str, channels: int, place: _Filter) -> str:
    """V [16, tiles · N, I]."""
    seen = graph.op("MatMul", place.append(graph), _pixels_first(graph, x, channels, place.pixels))
    return graph.op("Reshape", seen, graph.ints(_FREQUENCIES, -1, channels))


def _facts(graph: Graph, node: NodeProto) -> tuple[int, int, _Filter, _Filter]:
    """Filters, channels, B [16 · tiles, pixels of x] and Aᵀ [16 · tiles, pixels of y]."""
    (x, weight), y = node.input[:2], node.output[0]
    shape = static(graph.shape(weight), "weights")
    filters, channels = shape[1:] if len(shape) == 3 else shape[:2]
    size, out = (graph.sizes(name, "pixels")[1:] for name in (x, y))
    rows, columns = (_along(*each) for each in zip(size, out, node.attribute[0].ints[:2], strict=True))
    return filters, channels, _Filter((rows[0], columns[0])), _Filter((rows[1], columns[1]))


def _along(size: int, out: int, before: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B [4, tiles, size] and Aᵀ [4, tiles, out] along one axis."""
    tiles = -(-out // 2)
    place, collect = np.zeros((4, tiles, size), np.float32), np.zeros((4, tiles, out), np.float32)
    for tile in range(tiles):
        for entry in range(4):
            pixel = 2 * tile + entry - before
            if 0 <= pixel < size:
                place[:, tile, pixel] = _INPUT[:, entry]
        for entry in range(min(2, out - 2 * tile)):
            collect[:, tile, 2 * tile + entry] = _OUTPUT[entry]
    return place, collect
