"""Table of gradient rules, by ONNX operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import NodeProto

from export.gradients.builder import Graph

Gradients = Sequence[str | None]
Rule = Callable[[Graph, NodeProto, Gradients], Gradients]
"""Function from the gradients of a node's outputs to those of its inputs.

None stands for an output without a gradient, and for an input that is not differentiable or not wanted. A rule is
called only if an input's gradient is wanted and an output has one; it appends what it needs to the graph. What it
returns for absent optional inputs is ignored. An input that is wanted and gets None is refused by name, as is anything
for which a rule raises NotImplementedError; the text of that error says what was found.
"""

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Decorator that enters a function into the table."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return enter


def elementwise(operator: str) -> Callable[[Callable[[Graph, NodeProto, str], str]], Rule]:
    """Decorator that enters a rule for an operator with one input and one output of the same shape."""

    def enter(function: Callable[[Graph, NodeProto, str], str]) -> Rule:
        def apply(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
            (gradient,) = gradients[:1]
            assert gradient is not None
            return [function(graph, node, gradient)]

        return rule(operator)(apply)

    return enter
