"""Reverse-mode differentiation of an ONNX graph, by ONNX operators of the default domain alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from export.gradients import activations, arithmetic, convolution, normalization, pooling, products, recurrent, shaping
from export.gradients.graph import Graph
from export.gradients.rules import RULES

__all__ = ["Graph", "NoGradientError", "differentiate"]
_RULE_MODULES = (activations, arithmetic, convolution, normalization, pooling, products, recurrent, shaping)


class NoGradientError(Exception):
    """A node has no rule, or its rule does not cover it.

    Attributes:
        node: the node of the forward graph.
        found: what was found, in words.
    """

    def __init__(self, node: NodeProto, found: str) -> None:
        super().__init__(found)
        self.node, self.found = node, found


def differentiate(
    graph: Graph, nodes: Sequence[NodeProto], gradients: Mapping[str, str], by: Sequence[str]
) -> dict[str, str]:
    """Append the backward pass of some nodes to a graph.

    Args:
        graph: has the forward pass already.
        nodes: the forward nodes, in order of execution.
        gradients: by forward value, the name of the gradient to start from.
        by: the values to differentiate by.

    Returns:
        The gradient of each value of `by` that is used, by name.

    Raises:
        NoGradientError: a node on the way can't be differentiated.
    """
    graph.wanted = set(by)
    for node in nodes:
        if graph.wanted & set(node.input):
            graph.wanted.update(name for name in node.output if name and graph.differentiable(name))
    found = dict(gradients)
    for node in reversed(nodes):
        of_outputs = [found.get(name) if name else None for name in node.output]
        if not graph.wanted & set(node.input) or not any(of_outputs):
            continue
        if node.op_type not in RULES:
            raise NoGradientError(node, node.op_type)
        try:
            of_inputs = RULES[node.op_type](graph, node, of_outputs)
        except NotImplementedError as error:
            raise NoGradientError(node, str(error)) from error
        for name, gradient in zip(node.input, of_inputs, strict=False):
            if gradient is not None and name in graph.wanted:
                found[name] = graph.op("Add", found[name], gradient) if name in found else gradient
    return {name: found[name] for name in by if name in found}
