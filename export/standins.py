"""Gradients of this package's own where onnxruntime-training has none, or a wrong one.

Before the runtime differentiates a graph, a stand-in takes the place of each such node: an operator of which the
runtime only knows that its gradient is another such operator. In what it makes of the graph, the first becomes the node
again, and the second what the node's rule in `export.gradients` appends. So both engines train whatever has a rule, and
what the runtime differentiates itself stays with the runtime.

The stand-ins are the operator ATen, whose gradient the runtime looks up by an attribute; none is left in what is
written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, helper

from export.forward.tracing import Dim, Trace, trace
from export.gradients import Graph, differentiate, is_detached, recurrent
from export.gradients.builder import attributes, initializers_of
from export.native import Constants, constants_of, is_foreign

_numbers = itertools.count()
DOMAIN, OPERATOR = "org.pytorch.aten", "ATen"
_KEY, _OVERLOAD, _GRADIENT = "operator", "overload_name", "gradient"


@dataclass(frozen=True)
class Definition:
    """What the runtime has to know of a stand-in.

    Attributes:
        key: Attribute that tells the stand-in from others.
        taken: Values that the gradient takes: gradients of outputs, GO(i), inputs, I(i), and outputs, O(i).
        found: Gradients that it gives, GI(i), or "" for inputs that need none; nothing where gradients are blocked.
    """

    key: str
    taken: list[str]
    found: list[str]


@dataclass(frozen=True)
class StandIn:
    """Stand-in for a node.

    Attributes:
        key: Attribute that tells it from others; the runtime never forgets one.
        node: The node.
        forward: Nodes that take its place in the training graph.
        backward: Nodes that compute the gradients of its inputs.
        taken: Names in `backward` of the gradients of its outputs, by output; of those that have one.
        found: Names in `backward` of the gradients of its inputs, by input; of those that need one.
    """

    key: str
    node: NodeProto
    forward: Sequence[NodeProto]
    backward: Sequence[NodeProto]
    taken: Mapping[str, str]
    found: Mapping[str, str]

    @property
    def inputs(self) -> list[str]:
        """Inputs of the node, each once."""
        return list(dict.fromkeys(filter(None, self.node.input)))

    @property
    def outputs(self) -> list[str]:
        """Outputs of the node."""
        return [name for name in self.node.output if name]

    @property
    def definition(self) -> Definition:
        """What the runtime has to know."""
        taken = [f"GO({self.outputs.index(name)})" for name in self.taken]
        values = [f"I({n})" for n in range(len(self.inputs))] + [f"O({n})" for n in range(len(self.outputs))]
        found = [f"GI({number})" if name in self.found else "" for number, name in enumerate(self.inputs)]
        return Definition(self.key, taken + values, found if self.found else [])

    def resolved(self, node: NodeProto, *, training: bool) -> list[NodeProto]:
        """Nodes in place of what the runtime made of the stand-in, or of its gradient."""
        before, own = [*self.inputs, *self.outputs], self.forward if training else [self.node]
        if attributes(node).get(_OVERLOAD) == _GRADIENT:
            before = [*self.taken.values(), *before, *(self.found.get(name, "") for name in self.inputs)]
            own = self.backward
        names = dict(zip(before, (*node.input, *node.output), strict=False))  # without the last outputs if not in use
        return [_renamed(each, names) for each in own]


class StandIns:
    """Stand-ins in a graph.

    Args:
        model: Forward pass.
        trained: Names of the parameters to differentiate with respect to.
        examples: Raw inputs [N, ...] by name, with N at least 3, to trace shapes with if need be.
        held: Names of further parameters whose values may be others later.

    Attributes:
        model: Forward pass with the stand-ins.

    Raises:
        NoGradientError: Neither the runtime nor a rule can differentiate a node.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        trained: Collection[str],
        examples: Mapping[str, NDArray[Any]],
        held: Collection[str] = (),
    ) -> None:
        self.model = model
        self._made: dict[str, StandIn] = {}
        self._constants: Constants = {}
        known = constants_of(model.graph)
        foreign = {node.output[0] for node in model.graph.node if is_foreign(node, known)}
        if not foreign:
            return
        traced = trace(model, examples, {*trained, *held})
        graph = Graph(traced, prefix="ours")
        wanted, reached = _on_the_way(model.graph, graph, trained)
        made = [
            _stand_in(graph, node, wanted, reached)
            for node in model.graph.node
            if node.output[0] in foreign
            and wanted & set(node.input)
            and (is_detached(node) or reached & wanted & set(node.output))
        ]
        self._made = {stand_in.key: stand_in for stand_in in made}
        self._constants = graph.initializers
        self.model = _standing_in(model, made, traced)

    @property
    def definitions(self) -> list[Definition]:
        """What the runtime has to know of them."""
        return [stand_in.definition for stand_in in self._made.values()]

    def resolve(self, model: onnx.ModelProto, *, training: bool) -> None:
        """Put the nodes back in place of their stand-ins, and gradients in place of the stand-ins' gradients.

        Args:
            model: Graph that the runtime made of it; changed in place.
            training: Whether nodes get the form that their gradients need.
        """
        if not self._made:
            return
        nodes: list[NodeProto] = []
        for node in model.graph.node:
            if node.op_type == OPERATOR:
                nodes.extend(self._made[attributes(node)[_KEY]].resolved(node, training=training))
            else:
                nodes.append(node)
        known = {name for node in model.graph.node for name in node.output}
        known.update(value.name for value in (*model.graph.initializer, *model.graph.input))
        constants = {name: array for name, array in self._constants.items() if name not in known}
        model.graph.initializer.extend(initializers_of(nodes, constants))
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        imports = [each for each in model.opset_import if each.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(imports)


def register(definitions: Iterable[Definition]) -> None:
    """Tell onnxruntime-training, in this process, of stand-ins and their gradients."""
    from onnxruntime.capi import _pybind_state as native

    for definition in definitions:
        key = f"{DOMAIN}::{OPERATOR}::{definition.key}::"
        if not definition.found:
            native.register_custom_stop_gradient_edges(key, set(range(len(definition.taken))))
            continue
        gradient = native.GradientNodeDefinition()
        gradient.op_type, gradient.domain = OPERATOR, DOMAIN
        gradient.inputs, gradient.outputs = definition.taken, definition.found
        given = []
        for name, value in ((_KEY, definition.key), (_OVERLOAD, _GRADIENT)):
            attribute = native.GradientNodeAttributeDefinition()
            attribute.name, attribute.value_json = name, json.dumps(value)
            attribute.dtype, attribute.is_tensor = "string", False
            given.append(attribute)
        gradient.attributes = given
        native.register_gradient_definition(key, [gradient])


def _on_the_way(graph: onnx.GraphProto, known: Graph, trained: Collection[str]) -> tuple[set[str], set[str]]:
    """Values that depend on what is trained, and those of them that the outputs depend on."""
    wanted = set(trained)
    for node in graph.node:
        if wanted & set(node.input) and not is_detached(node):
            wanted.update(name for name in node.output if name and known.differentiable(name))
    reached = {info.name for info in graph.output}
    for node in reversed(graph.node):
        if reached & set(node.output):
            reached.update(wanted & set(node.input))
    return wanted, reached


def _stand_in(graph: Graph, node: NodeProto, wanted: set[str], reached: set[str]) -> StandIn:
    """Stand-in for a node.

    Raises:
        NoGradientError: No rule covers the node.
    """
    key = str(next(_numbers))
    if is_detached(node):
        return StandIn(key, node, [node], [], {}, {})
    forward, backward = graph.branch(), graph.branch()
    parts = recurrent.split(graph, [node])
    for part in parts:
        if part.op_type in (recurrent.LSTM, recurrent.GRU):
            recurrent.forward(forward, part)
        else:
            forward.nodes.append(part)
    taken = {name: graph.name("gradient") for name in node.output if name in reached & wanted}
    by = [name for name in dict.fromkeys(node.input) if name in wanted]
    gradients = differentiate(backward, parts, taken, by)
    found = {name: backward.op("Identity", gradient) for name, gradient in gradients.items()}
    for each in backward.nodes:
        each.name = f"{node.name}_Grad/{each.name}"  # as the runtime calls its own
    return StandIn(key, node, forward.nodes, backward.nodes, taken, found)


def _standing_in(model: onnx.ModelProto, made: Sequence[StandIn], traced: Trace) -> onnx.ModelProto:
    """Copy of a model with stand-ins in place of nodes, and with the types and shapes of their outputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    by_output = {stand_in.outputs[0]: stand_in for stand_in in made}
    for node in model.graph.node:
        stand_in = by_output.get(node.output[0])
        if stand_in is not None:
            key = {_KEY: stand_in.key}
            node = helper.make_node(OPERATOR, stand_in.inputs, stand_in.outputs, name=node.name, domain=DOMAIN, **key)
        changed.graph.node.append(node)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    known = {info.name for info in changed.graph.value_info}
    for name in (name for stand_in in made for name in stand_in.outputs if name not in known):
        kind = helper.np_dtype_to_tensor_dtype(traced.dtypes[name])
        shape = [_size(dim, batch) for dim in traced.shapes[name]]
        changed.graph.value_info.append(helper.make_tensor_value_info(name, kind, shape))
    changed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return changed


def _size(dim: Dim, batch: str) -> int | str:
    if isinstance(dim, int):
        return dim
    return batch if dim.factor == 1 else f"{dim.factor}*{batch}"


def _renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """Copy of a node with other names of values, also in its subgraphs."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for values in (copy.input, copy.output):
        values[:] = [names.get(name, name) for name in values]
    for attribute in copy.attribute:
        if attribute.type == AttributeProto.GRAPH:
            inner = [_renamed(each, names) for each in attribute.g.node]
            del attribute.g.node[:]
            attribute.g.node.extend(inner)
    return copy
