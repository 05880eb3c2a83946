"""Reverse-mode differentiation of an ONNX graph, in ONNX operators of the default domain alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest

from onnx import NodeProto

from export.gradients import (  # noqa: F401  (each registers its rules)
    activations,
    arithmetic,
    batch_normalization,
    convolution,
    functions,
    indexing,
    normalization,
    pooling,
    products,
    recurrent,
    reductions,
    resizing,
    shaping,
    winograd,
)
from export.gradients.builder import Graph
from export.gradients.rules import RULES

__all__ = ["Graph", "NoGradientError", "differentiate", "is_detached", "refusing"]


class NoGradientError(Exception):
    """A node has no rule, or its rule or its lowering does not cover it.

    Attributes:
        node: Node of the forward graph.
        found: Description of what was found.
    """

    def __init__(self, node: NodeProto, found: str) -> None:
        super().__init__(found)
        self.node, self.found = node, found


def is_detached(node: NodeProto) -> bool:
    """Whether a node passes its input on and blocks its gradient: a Mean of a single input, for torch's `detach`."""
    return node.op_type == "Mean" and len(node.input) == 1


def differentiate(
    graph: Graph, nodes: Sequence[NodeProto], gradients: Mapping[str, str], by: Sequence[str]
) -> dict[str, str]:
    """Append the backward pass of some nodes to a graph.

    Args:
        graph: Graph that already has the forward pass.
        nodes: Forward nodes, in order of execution.
        gradients: Names of the gradients to start from, by forward value.
        by: Values to differentiate with respect to.

    Returns:
        Names of the gradients of the values of `by` that are used, by value.

    Raises:
        NoGradientError: A node on the way can't be differentiated.
    """
    graph.wanted = set(by)
    for node in nodes:
        if graph.wanted & set(node.input) and not is_detached(node):
            graph.wanted.update(name for name in node.output if name and graph.differentiable(name))
    found = dict(gradients)
    for node in reversed(nodes):
        grad_outputs = [found.get(name) if name else None for name in node.output]
        if not graph.wanted & set(node.input) or not any(grad_outputs):
            continue
        if node.op_type not in RULES:
            raise NoGradientError(node, node.op_type)
        with refusing(node):
            grad_inputs = RULES[node.op_type](graph, node, grad_outputs)
            for name, gradient in zip_longest(node.input, grad_inputs[: len(node.input)]):
                if name not in graph.wanted:
                    continue
                if gradient is None:
                    number = list(node.input).index(name) + 1
                    raise NotImplementedError(f"a {node.op_type} with a trained value as input {number}")
                found[name] = graph.op("Add", found[name], gradient) if name in found else gradient
    return {name: found[name] for name in by if name in found}


@contextmanager
def refusing(node: NodeProto) -> Iterator[None]:
    """Turn the NotImplementedError of a rule or a lowering into an error that names the node.

    Raises:
        NoGradientError: The rule or lowering does not cover this node.
    """
    try:
        yield
    except NotImplementedError as error:
        raise NoGradientError(node, str(error)) from error
