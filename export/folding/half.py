"""Conversion of a folded model to float16, with the operators that float16 would break left in float32."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, defs, helper, numpy_helper

from export.folding.inference import prune, replace
from export.folding.ranges import Ranges, float_values

NOTHING = Ranges()
_SUFFIXES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


def to_float16(model: onnx.ModelProto, parameters: Collection[str], ranges: Ranges = NOTHING) -> onnx.ModelProto:
    """Make a model compute in float16 from the first parameter on, but for what its ranges keep in float32.

    The preprocessing before the first parameter stays float32.

    Args:
        model: Model in float32, without subgraphs and Constant nodes.
        parameters: Names of the initializers that come from tensors of the layout.
        ranges: Values and operators to keep in float32.

    Returns:
        Model with float16 weights and the inputs and outputs of `model`.
    """
    halved = onnx.ModelProto()
    halved.CopyFrom(model)
    _Conversion(halved, parameters, ranges).convert()
    prune(halved.graph)
    return halved


class _Conversion:
    """Conversion of one graph, in place.

    A value keeps its name in the precision in which it is computed or stored; in the other, it has a name with a
    suffix, and a Cast makes it where it is first read.
    """

    def __init__(self, model: onnx.ModelProto, parameters: Collection[str], ranges: Ranges) -> None:
        self._graph = model.graph
        self._opset = model.opset_import[0].version
        self._floats = float_values(model)
        self._constants = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        self._parameters = self._constants.keys() & parameters
        self._ranges = ranges
        self._precision = dict.fromkeys(self._floats, TensorProto.FLOAT)
        self._precision |= {n: TensorProto.FLOAT16 for n in self._parameters if n not in ranges.outside}
        self._made: set[str] = set()
        self._nodes: list[NodeProto] = []

    def convert(self) -> None:
        """Replace the nodes and initializers of the graph."""
        outputs = {info.name for info in self._graph.output} & self._floats
        reached = set(self._parameters)
        for number, node in enumerate(self._graph.node):
            if reached.isdisjoint(node.input):
                self._nodes.append(node)
                continue
            reached.update(name for name in node.output if name)
            self._append(node, narrow=not self._ranges.needs_float32(number, node), outputs=outputs)
        for name, tensor in self._constants.items():
            if self._precision[name] == TensorProto.FLOAT16:
                tensor.CopyFrom(_half(tensor, name))
        replace(self._graph.node, self._nodes)

    def _append(self, node: NodeProto, *, narrow: bool, outputs: Collection[str]) -> None:
        precision = TensorProto.FLOAT16 if narrow else TensorProto.FLOAT
        fixed = _fixed(node, self._opset)
        inputs = [
            self._in(name, TensorProto.FLOAT if index in fixed else precision) if name in self._floats else name
            for index, name in enumerate(node.input)
        ]
        made = [name for name in node.output if name in self._floats]
        results = {name: name for name in made}
        casts = []
        for name in made:
            kept = precision if narrow or self._ranges.keeps(name) else TensorProto.FLOAT16
            if name in outputs:
                kept = TensorProto.FLOAT
            self._precision[name] = kept
            if kept != precision:
                results[name] = self._other(name)
                casts.append(_cast(results[name], name, kept))
                self._made.add(results[name])
        replace(node.input, inputs)
        replace(node.output, [results.get(name, name) for name in node.output])
        if narrow:
            _narrow_attributes(node)
        self._nodes += [node, *casts]

    def _in(self, name: str, precision: int) -> str:
        """Name of a value in a precision."""
        if self._precision[name] == precision:
            return name
        other = self._other(name)
        if other not in self._made:
            self._made.add(other)
            if name in self._constants and name not in self._parameters:
                self._graph.initializer.append(_half(self._constants[name], other))
            else:
                self._nodes.append(_cast(name, other, precision))
        return other

    def _other(self, name: str) -> str:
        is_half = self._precision[name] == TensorProto.FLOAT16
        return f"{name}.{_SUFFIXES[TensorProto.FLOAT if is_half else TensorProto.FLOAT16]}"


def _fixed(node: NodeProto, opset: int) -> set[int]:
    """Indices of the inputs that an operator takes in float32 only, such as the scales of a Resize."""
    schema = defs.get_schema(node.op_type, opset)
    return {index for index, each in enumerate(schema.inputs) if each.type_str == "tensor(float)"}


def _narrow_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.t.data_type == TensorProto.FLOAT:  # of ConstantOfShape
            attribute.t.CopyFrom(_half(attribute.t, attribute.t.name))


def _half(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    with np.errstate(over="ignore"):  # a value that is too large becomes infinite, which the outputs show
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name)


def _cast(source: str, target: str, dtype: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=dtype)
