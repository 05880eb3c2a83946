"""`train_step.onnx` and `eval_step.onnx`: training and evaluation in operators that every onnxruntime has.

All are of ONNX's default domain, opset 18, with a dynamic batch [B]. The P trained entries are one float32 vector: the
shared and personal tensors in the order of the layout, each flattened in C order.

Inputs of `train_step.onnx`, float32 unless stated otherwise:

    x, y            the batch, in the manifest's dtypes
    seed            int64 [], decides the masks of dropout
    weights         [P]
    statistics      [S], running statistics of the layout in order, each flattened; only where there are any
    accumulated     [P], or [1] for none: gradient of the earlier micro-batches, weighted by their shares
    share           [], or [H] for H heads: this micro-batch's share of what the loss divides by, in the batch; 1 for a
                    whole batch, which the Jacobian correction needs
    last            bool [], whether to update after this micro-batch
    learning_rate   []
    adjusted        bool [], whether the next three are in use
    mu, h           [P] or [1]: the gradient becomes gradient + mu · weights + h
    max_norm        []: the gradient is then scaled by min(1, max_norm / (norm + 1e-6)); inf for no clipping
    NAME            each tensor that updates hold (`fedpara_edge.factors.update`), in its shape, under its own name
    momentum        [P], state of SGD with momentum
    moment1, moment2 [P], steps []: state of AdamW

Outputs:

    loss            [], mean over this micro-batch times the loss's weight; [H] for H heads
    gradient        [P], accumulated + share · gradient, before mu, h and clipping; with the Jacobian correction
                    (`jacobian`), that of the loss and the correction
    new_weights, and new_ with each name of the optimizer's state; unchanged where `last` is false

Every `new_` output may be bound to the memory of its input. `eval_step.onnx` takes x, y, weights and what updates hold,
and gives loss and logits [B, ...], without dropout. x, y and logits stand for the inputs, labels and outputs of the
bundle's interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from export.forward.batchnorm import new_statistics
from export.forward.graph import DRAWING, IR_VERSION, OPSET, ForwardGraph
from export.forward.tracing import Trace, trace
from export.gradients import (
    Graph,
    NoGradientError,
    batch_normalization,
    convolution,
    differentiate,
    normalization,
    pooling,
    recurrent,
    refusing,
    shaping,
    winograd,
)
from export.gradients.builder import initializers_of, needed
from export.step.composed import ComposedWeight, composed_weights
from export.step.draws import draw, from_seed
from export.step.dropout import dropout, drops
from export.step.frobenius import append_decay
from export.step.jacobian import append_correction
from export.step.losses import append_losses
from export.step.rewrites import with_static_shape, without_sequences, without_unused
from export.step.weight_update import CORRECTION, DECAY, append_update, state_shapes
from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import Layout, TensorSpec
from fedpara_edge.formats.bundle import EVAL_STEP, FORMS, TRAIN_STEP
from fedpara_edge.formats.interface import Head

_FLOAT, _BOOL, _INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
_SETTINGS = ("seed", "share", "last", "learning_rate", "adjusted", "mu", "max_norm", "accumulated", "h")
INTERFACE = frozenset(
    (*_SETTINGS, "weights", "statistics", "momentum", "moment1", "moment2", "steps", "gradient", "loss")
)
"""Names in the graphs that are none of the model's own."""

_LOWERED: dict[str, Callable[[Graph, NodeProto], None]] = {
    "BatchNormalization": batch_normalization.forward,
    "Conv": convolution.forward,
    "LayerNormalization": normalization.forward,
    normalization.GROUP: normalization.forward,
    "MaxPool": pooling.forward,
    recurrent.LSTM: recurrent.forward,
    recurrent.GRU: recurrent.forward,
    winograd.WINOGRAD: winograd.forward,
}
_LOWERED_IN_EVALUATION = {"BatchNormalization": batch_normalization.evaluate}
_LOWERED_WITHOUT_GRADIENT = {"BatchNormalization": batch_normalization.forward}
_RECURRENT = ("LSTM", "GRU")


@dataclass(frozen=True)
class StepSpec:
    """Specification of the two graphs.

    Args:
        tensors: Trained tensors, in the layout's order.
        heads: Outputs to train, with their labels and losses.
        optimizer: Constants of the optimizer.
        layout: Layout of the model; needed for Jacobian correction and Frobenius decay only.
        statistics: Running statistics, in the layout's order.
        held: Tensors that updates hold.
        tunable: Whether devices may choose between two forms of the training step.
    """

    tensors: Sequence[TensorSpec]
    heads: Sequence[Head]
    optimizer: Mapping[str, Any]
    layout: Layout | None = None
    statistics: Sequence[TensorSpec] = ()
    held: Sequence[TensorSpec] = ()
    tunable: bool = False

    @property
    def vectors(self) -> dict[str, Sequence[TensorSpec]]:
        """Tensors of each vector that the graphs take apart, by the vector's name."""
        return {"weights": self.tensors, **({"statistics": self.statistics} if self.statistics else {})}

    @property
    def parameters(self) -> int:
        """Number of trained entries."""
        return sum(tensor.size for tensor in self.tensors)


def write_steps(graph: ForwardGraph, folder: Path, spec: StepSpec, examples: Mapping[str, NDArray[Any]]) -> None:
    """Write `train_step.onnx` and `eval_step.onnx` into `folder`, and another form of the step if it is tunable.

    Args:
        graph: Forward pass.
        folder: Folder to write to.
        spec: Specification of the graphs.
        examples: Raw inputs [N, ...] by name, with N at least 3, to trace the shapes with.

    Raises:
        InputError: An operator can't be differentiated (it is named with the module it came from), or there is nothing
            to apply the Jacobian correction to.
    """
    forward = _without_clashes(graph.model)
    changing = [_inner(tensor.name) for tensors in (*spec.vectors.values(), spec.held) for tensor in tensors]
    known = trace(forward, examples, changing)
    evaluated, known_there = forward, known
    if graph.evaluation is not None:
        evaluated = _without_clashes(graph.evaluation)
        known_there = trace(evaluated, examples, changing)
    weights: list[ComposedWeight] = []
    for option in (CORRECTION, DECAY):
        if option in spec.optimizer:
            assert spec.layout is not None
            weights = composed_weights(forward, examples, spec.layout, option=option, inner=_inner)
    try:
        train_step = _train_step(forward, known, spec, weights)
        models = {TRAIN_STEP: train_step, EVAL_STEP: _eval_step(evaluated, known_there, spec)}
        if spec.tunable:
            direct = _train_step(forward, known, spec, weights, direct=True)
            if direct != train_step:
                models[FORMS["direct"]] = direct
    except NoGradientError as error:
        raise InputError(
            f"{graph.place_of(error.node.name)}: expected operators with a gradient in the engine onnxruntime, found "
            f"{error.found}, which has none; replace it (nothing was written)"
        ) from error
    for name, model in models.items():
        onnx.save(model, folder / name)


def _train_step(
    forward: onnx.ModelProto,
    known: Trace,
    spec: StepSpec,
    weights: Sequence[ComposedWeight],
    *,
    direct: bool = False,
) -> onnx.ModelProto:
    graph = Graph(known, direct=direct)
    _append_parameters(graph, spec)
    nodes = _append_forward(graph, forward, known, spec, training=True)
    loss, seeds = append_losses(graph, spec.heads, "share")
    if DECAY in spec.optimizer:
        share = "share" if len(spec.heads) == 1 else graph.op("ReduceMean", "share", keepdims=0)
        seeds |= append_decay(graph, weights, strength=spec.optimizer[DECAY], share=share)
    names = [_inner(tensor.name) for tensor in spec.tensors]
    corrected = weights if CORRECTION in spec.optimizer else ()
    by = [*names, *(value for weight in corrected for value in weight.values)]
    gradients = differentiate(graph, nodes, seeds, by)
    missing = [name for name in names if name not in gradients]
    if missing:
        raise InputError(f"parameter {missing[0]!r}: expected the loss to depend on it, found that it does not")
    for weight in corrected:
        strength = spec.optimizer[CORRECTION]
        corrections = append_correction(
            graph, nodes, weight, gradients, strength=strength, learning_rate="learning_rate"
        )
        for name, correction in corrections.items():
            gradients[name] = graph.op("Add", gradients[name], correction)
    flat = [graph.op("Reshape", gradients[name], graph.ints(-1)) for name in names]
    graph.define("loss", "Identity", loss)
    graph.define("gradient", "Add", graph.op("Concat", *flat, axis=0) if len(flat) > 1 else flat[0], "accumulated")
    parameters = spec.parameters
    state = {"weights": (parameters,), **state_shapes(spec.optimizer, parameters)}
    _append_if_last(graph, spec, state)
    statistics = _append_new_statistics(graph, forward, spec)
    inputs = [
        *_batch_inputs(forward, spec),
        *_held_inputs(spec),
        *(_info(name, kind, ()) for name, kind in (("seed", _INT64), ("last", _BOOL), ("adjusted", _BOOL))),
        _info("share", _FLOAT, _loss_shape(spec)),
        *(_info(name, _FLOAT, ()) for name in ("learning_rate", "max_norm")),
        *(_info(name, _FLOAT, (f"P or 1 ({name})",)) for name in ("accumulated", "mu", "h")),
        *(_info(name, _FLOAT, shape) for name, shape in {**state, **statistics}.items()),
    ]
    outputs = [
        _info("loss", _FLOAT, _loss_shape(spec)),
        _info("gradient", _FLOAT, (parameters,)),
        *(_info(f"new_{name}", _FLOAT, shape) for name, shape in {**state, **statistics}.items()),
    ]
    return _model(graph, "train_step", inputs, outputs)


def _eval_step(forward: onnx.ModelProto, known: Trace, spec: StepSpec) -> onnx.ModelProto:
    graph = Graph(known)
    _append_parameters(graph, spec)
    _append_forward(graph, forward, known, spec, training=False)
    loss, _ = append_losses(graph, spec.heads)
    graph.define("loss", "Identity", loss)
    vectors = {name: sum(tensor.size for tensor in tensors) for name, tensors in spec.vectors.items()}
    of_vectors = [_info(name, _FLOAT, (size,)) for name, size in vectors.items()]
    inputs = [*_batch_inputs(forward, spec), *_held_inputs(spec), *of_vectors]
    return _model(graph, "eval_step", inputs, [_info("loss", _FLOAT, _loss_shape(spec)), *forward.graph.output])


def _append_parameters(graph: Graph, spec: StepSpec) -> None:
    """Cut each vector into its tensors, under their own names.

    Uses Slices: onnxruntime 1.23.0 and 1.23.1 refuse a Split whose sizes take more than 127 bytes (16 or more pieces).
    """
    for vector, tensors in spec.vectors.items():
        start = 0
        for tensor in tensors:
            end = start + tensor.size
            piece = graph.op("Slice", vector, graph.ints(start), graph.ints(end), graph.ints(0))
            graph.define(_inner(tensor.name), "Reshape", piece, graph.ints(*tensor.shape))
            start = end
    for tensor in spec.held:
        if _inner(tensor.name) != tensor.name:
            graph.define(_inner(tensor.name), "Identity", tensor.name)


def _append_new_statistics(graph: Graph, forward: onnx.ModelProto, spec: StepSpec) -> dict[str, tuple[int, ...]]:
    """Append the vector of the running statistics after the batch; return its shape by its name, if there are any."""
    if not spec.statistics:
        return {}
    values = new_statistics(forward)
    graph.define("new_statistics", "Concat", *(values[_inner(tensor.name)] for tensor in spec.statistics), axis=0)
    return {"statistics": (sum(tensor.size for tensor in spec.statistics),)}


def _append_forward(
    graph: Graph, forward: onnx.ModelProto, known: Trace, spec: StepSpec, *, training: bool
) -> list[NodeProto]:
    """Append the forward pass; return its nodes as they are to be differentiated.

    What nothing trained can change comes first and keeps its operators: those for a gradient may be slower.
    """
    changing = [node for node in forward.graph.node if not all(n in known.constants for n in node.output if n)]
    for rewrite in (without_unused, without_sequences):
        changing = rewrite(graph, changing)
    fixed: list[NodeProto] = []
    if training:
        fixed, changing = _apart(changing, [_inner(tensor.name) for tensor in spec.tensors])
        rewrites = [shaping.join_slices, normalization.fuse, recurrent.split, pooling.before_relu, pooling.by_axis]
        if not graph.direct and CORRECTION not in spec.optimizer:  # which reads the weights as the model composes them
            rewrites.append(winograd.fuse)
        for rewrite in rewrites:
            changing = rewrite(graph, changing)
    nodes: list[NodeProto] = []
    for node in (*fixed, *changing):
        lowered = _LOWERED if training else _LOWERED_IN_EVALUATION
        if len(nodes) < len(fixed):
            lowered = _LOWERED_WITHOUT_GRADIENT
        with refusing(node):
            if node.op_type == "Dropout":
                node = _append_dropout(graph, node, number=len(nodes), training=training)
            elif node.op_type in DRAWING:
                draw(graph, node, sum(made.op_type in DRAWING for made in nodes), from_seed("seed"))
                node = helper.make_node(node.op_type, [], list(node.output), name=node.name)  # without a gradient
            elif node.op_type in lowered:
                lowered[node.op_type](graph, node)
            else:
                node = with_static_shape(graph, node, known)
                graph.nodes.append(node)
        nodes.append(node)
    return nodes


def _apart(nodes: Sequence[NodeProto], trained: Sequence[str]) -> tuple[list[NodeProto], list[NodeProto]]:
    """Nodes that nothing trained can change, if any of them has operators for a gradient, and the others."""
    reached, fixed, changing = set(trained), [], []
    for node in nodes:
        if reached.isdisjoint(node.input):
            fixed.append(node)
        else:
            reached.update(name for name in node.output if name)
            changing.append(node)
    if any(node.op_type in (*_LOWERED, *_RECURRENT) for node in fixed):
        return fixed, changing
    return [], list(nodes)


def _append_dropout(graph: Graph, node: NodeProto, *, number: int, training: bool) -> NodeProto:
    if len(node.output) > 1:
        raise NotImplementedError("a Dropout whose mask is in use")
    if not training or not drops(graph, node):
        graph.define(node.output[0], "Identity", node.input[0])
    else:
        graph.set_shape(dropout(graph, node, number, "seed"), graph.shape(node.input[0]))
    return graph.nodes[-1]


def _append_if_last(graph: Graph, spec: StepSpec, state: Mapping[str, tuple[int, ...]]) -> None:
    update, keep = graph.branch(), graph.branch()
    gradient = _append_adjustment(update, spec.parameters)
    new = append_update(update, spec.optimizer, "weights", gradient, "learning_rate")
    old = {name: keep.op("Identity", name) for name in state}
    branches = [
        helper.make_graph(branch.nodes, name, [], [_info(values[key], _FLOAT, shape) for key, shape in state.items()])
        for name, branch, values in (("update", update, new), ("keep", keep, old))
    ]
    graph.nodes.append(
        helper.make_node(
            "If",
            ["last"],
            [f"new_{name}" for name in state],
            name="update",
            then_branch=branches[0],
            else_branch=branches[1],
        )
    )


def _append_adjustment(graph: Graph, parameters: int) -> str:
    """Append the affine term and the clipping where these are in use; return the gradient."""
    adjust, leave = graph.branch(), graph.branch()
    moved = adjust.op("Add", "gradient", adjust.op("Mul", "weights", "mu"))
    moved = adjust.op("Add", moved, "h")
    norm = adjust.op("Sqrt", adjust.op("ReduceSum", adjust.op("Mul", moved, moved), keepdims=0))
    scale = adjust.op("Div", "max_norm", adjust.op("Add", norm, adjust.scalar(1e-6)))
    clipped = adjust.op("Mul", moved, adjust.op("Min", scale, adjust.scalar(1.0)))
    same = leave.op("Identity", "gradient")
    branches = [
        helper.make_graph(branch.nodes, name, [], [_info(value, _FLOAT, (parameters,))])
        for name, branch, value in (("adjust", adjust, clipped), ("leave", leave, same))
    ]
    return graph.op("If", "adjusted", then_branch=branches[0], else_branch=branches[1])


def _batch_inputs(forward: onnx.ModelProto, spec: StepSpec) -> list[onnx.ValueInfoProto]:
    labels = [head.label for head in spec.heads]
    dtypes = [helper.np_dtype_to_tensor_dtype(np.dtype(label.dtype)) for label in labels]
    infos = [_info(label.name, dtype, ("batch", *label.shape)) for label, dtype in zip(labels, dtypes, strict=True)]
    given = {info.name for info in forward.graph.input}  # with the labels of own losses
    return [*forward.graph.input, *(info for info in infos if info.name not in given)]


def _held_inputs(spec: StepSpec) -> list[onnx.ValueInfoProto]:
    return [_info(tensor.name, _FLOAT, tensor.shape) for tensor in spec.held]


def _loss_shape(spec: StepSpec) -> tuple[int, ...]:
    return () if len(spec.heads) == 1 else (len(spec.heads),)


def _info(name: str, dtype: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _model(
    graph: Graph, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    nodes = needed(graph.nodes, [info.name for info in outputs])
    proto = helper.make_graph(nodes, name, inputs, outputs, initializers_of(nodes, graph.initializers))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def _inner(name: str) -> str:
    """Name inside the graph of a value of the forward pass, whose own name may be that of an input of the graph."""
    return f"model.{name}" if name in INTERFACE or name.startswith("new_") else name


def _without_clashes(model: onnx.ModelProto) -> onnx.ModelProto:
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    for node in renamed.graph.node:
        node.input[:] = [_inner(name) for name in node.input]
        node.output[:] = [_inner(name) for name in node.output]
    for tensor in renamed.graph.initializer:
        tensor.name = _inner(tensor.name)
    return renamed
