"""The table of gradient rules, by ONNX operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import NodeProto

from export.gradients.builder import Graph

Gradients = Sequence[str | None]
Rule = Callable[[Graph, NodeProto, Gradients], Gradients]
"""From the gradients of a node's outputs (None: none) to those of its inputs (None: not differentiable or not wanted).

A rule is called only if an input's gradient is wanted and an output has one; it appends what it needs to the graph.
What it returns for absent optional inputs is ignored. An input that is wanted and gets none is refused by name, as is
all that a rule raises NotImplementedError for; its text says what was found.
"""

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return enter


def elementwise(operator: str) -> Callable[[Callable[[Graph, NodeProto, str], str]], Rule]:
    """Enter a rule for an operator with one input and one output of the same shape."""

    def enter(function: Callable[[Graph, NodeProto, str], str]) -> Rule:
        def apply(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
            (gradient,) = gradients[:1]
            assert gradient is not None
            return [function(graph, node, gradient)]

        return rule(operator)(apply)

    return enter
