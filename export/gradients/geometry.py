"""Geometry of a convolution: channels, sizes, strides and padding, as its gradients need them."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from export.gradients.builder import Graph, attributes, static
from export.gradients.windows import window_padding


@dataclass(frozen=True)
class Convolution:
    """Static facts about a Conv node; spatial sizes are lists over the spatial axes."""

    channels: int
    filters: int
    groups: int
    size: list[int]
    out: list[int]
    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]

    @staticmethod
    def from_conv(graph: Graph, node: NodeProto) -> Convolution:
        """Facts about a Conv of the forward graph.

        Raises:
            NotImplementedError: One of them grows with the batch.
        """
        given, what = attributes(node), f"channels, pixels or kernels of a {node.op_type}"
        _, *size = graph.sizes(node.input[0], what)
        _, *out = graph.sizes(node.output[0], what)
        filters, channels, *kernel = static(graph.shape(node.input[1]), what)
        groups = given.get("group", 1)
        strides = given.get("strides", [1] * len(kernel))
        dilations = given.get("dilations", [1] * len(kernel))
        before, after = window_padding(given, size, out, kernel)
        return Convolution(channels * groups, filters, groups, size, out, kernel, strides, dilations, before, after)

    @staticmethod
    def from_conv_transpose(graph: Graph, node: NodeProto) -> Convolution:
        """Facts about the convolution from a ConvTranspose's output to its input, which has the same weight.

        Raises:
            NotImplementedError: One of them grows with the batch, the node leaves its padding to be computed, or its
                output is padded by as much as the stride, which onnxruntime computes incorrectly.
        """
        given, what = attributes(node), f"channels, pixels or kernels of a {node.op_type}"
        if given.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in given:
            raise NotImplementedError("a ConvTranspose with computed padding")
        channels, *size = graph.sizes(node.output[0], what)
        filters, *out = graph.sizes(node.input[0], what)
        _, _, *kernel = static(graph.shape(node.input[1]), what)
        strides, dilations = (given.get(name, [1] * len(kernel)) for name in ("strides", "dilations"))
        if any(n >= s for n, s in zip(given.get("output_padding", [0] * len(strides)), strides, strict=True)):
            raise NotImplementedError("a ConvTranspose whose output is padded by its stride or more")
        pads = given.get("pads", [0] * 2 * len(kernel))
        before, after = list(pads[: len(kernel)]), list(pads[len(kernel) :])
        groups = given.get("group", 1)
        return Convolution(channels, filters, groups, size, out, kernel, strides, dilations, before, after)

    @property
    def is_depthwise(self) -> bool:
        """Whether every filter sees one of several channels."""
        return self.groups == self.channels > 1

    @property
    def reach(self) -> list[int]:
        """Extent of the dilated kernel minus one, by axis."""
        return [d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True)]

    @property
    def left_over(self) -> list[int]:
        """Number of last padded pixels that no position of the kernel reaches, by axis."""
        return [
            n + b + a - ((t - 1) * s + r + 1)
            for n, t, s, r, b, a in zip(
                self.size, self.out, self.strides, self.reach, self.before, self.after, strict=True
            )
        ]
