"""Artifacts of onnxruntime-training from a forward graph: training, eval and optimizer model, and checkpoint."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.training import artifacts, onnxblock

from export.apart import apart
from export.complaints import complaint
from export.folding.inference import prune
from export.forward.batchnorm import by_running_statistics, in_plain_operators, new_statistics
from export.forward.graph import IR_VERSION, ForwardGraph
from export.forward.ownloss import by_name
from export.forward.tracing import Batch, Trace
from export.gradients import Graph, NoGradientError
from export.gradients.builder import initializers_of, needed
from export.standins import Definition, StandIns, register
from export.step.draws import with_coins
from export.step.losses import append_losses
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import Head

LOSSES, SHARE = "losses", "share"
"""Names of the losses of several heads, and of their shares."""


def write_artifacts(
    graph: ForwardGraph,
    folder: Path,
    *,
    trainable: Sequence[str],
    heads: Sequence[Head],
    optimizer: Mapping[str, Any],
    examples: Mapping[str, NDArray[Any]],
    held: Sequence[str] = (),
) -> None:
    """Differentiate `graph` and write the artifacts into `folder`.

    Args:
        graph: Forward pass.
        folder: Folder that receives `training_model.onnx`, `eval_model.onnx`, `checkpoint` and, for an optimizer that
            onnxruntime-training has, `optimizer_model.onnx`.
        trainable: Names of the parameters to differentiate with respect to.
        heads: Outputs to train, with their labels and losses.
        optimizer: Constants of the optimizer (`export.step.weight_update`).
        examples: Raw inputs [N, ...] by name, with N at least 3, to trace the shapes with.
        held: Names of what updates hold, which can be set in the checkpoint as parameters can.

    Raises:
        InputError: An operator has no gradient; it is named with the module it came from.
    """
    write = partial(
        _write_graphs, graph, trainable=trainable, heads=heads, optimizer=optimizer, examples=examples, held=held
    )
    write(graph.model, folder)
    if graph.evaluation is not None:
        with tempfile.TemporaryDirectory() as scratch:
            write(graph.evaluation, Path(scratch))
            shutil.copyfile(Path(scratch) / "eval_model.onnx", folder / "eval_model.onnx")


def _write_graphs(
    graph: ForwardGraph,
    model: onnx.ModelProto,
    folder: Path,
    *,
    trainable: Sequence[str],
    heads: Sequence[Head],
    optimizer: Mapping[str, Any],
    examples: Mapping[str, NDArray[Any]],
    held: Sequence[str],
) -> None:
    """Write the artifacts of one form of the forward pass."""
    try:
        stand_ins = StandIns(in_plain_operators(model), trainable, examples, held)
        drawing = with_coins(stand_ins.model)
    except NoGradientError as error:
        raise _no_gradient(graph, error.found, error.node.name) from error
    losses = [LOSSES] if len(heads) > 1 else []
    outputs = [*graph.outputs, *losses]
    named = tuple(map(by_name, heads))
    with naming_operators(graph):
        apart(
            _generate,
            drawing,
            stand_ins.definitions,
            list(trainable),
            [*graph.statistics, *held],
            named,
            dict(optimizer),
            [*outputs, *new_statistics(model).values()],
            folder,
        )
    for name in ("training_model", "eval_model", "optimizer_model"):
        path = folder / f"{name}.onnx"
        if not path.exists():
            continue
        written = onnx.load(path)
        written.ir_version = IR_VERSION  # onnx stamps its newest on every model it makes
        stand_ins.resolve(written, training=name == "training_model")
        if name == "eval_model" and graph.statistics:
            del written.graph.output[1 + len(outputs) :]
            by_running_statistics(written.graph, model)
            prune(written.graph)
        if name == "optimizer_model":
            _correct_optimizer(written.graph)
        onnx.save(written, path)


def _generate(
    model: onnx.ModelProto,
    definitions: Sequence[Definition],
    trainable: list[str],
    kept: list[str],
    heads: Sequence[Head],
    optimizer: Mapping[str, Any],
    outputs: list[str],
    folder: Path,
) -> None:
    register(definitions)
    artifacts.generate_artifacts(
        model,
        requires_grad=trainable,
        loss=_loss_block(heads),
        optimizer=_optimizer_block(optimizer),
        frozen_params=kept,
        additional_output_names=outputs,
        artifact_directory=folder,
    )


def _correct_optimizer(graph: onnx.GraphProto) -> None:
    for output in graph.output:  # really a scalar, but declared [1], so that the runtime warns at each load
        output.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "adam_mode":  # 0: ε as in torch; 1 adds it before the bias correction
                attribute.i = 0


@contextlib.contextmanager
def naming_operators(graph: ForwardGraph) -> Iterator[None]:
    """Turn the runtime's complaint about an operator into an error that names the module behind it.

    Raises:
        InputError: The runtime has no gradient, or no kernel for the gradient, of an operator.
        OSError: The disk is full or refuses a write.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        known = _NO_GRADIENT.search(text) or _NO_KERNEL.search(text)
        system = _SYSTEM_ERROR.search(text)
        if system is not None:  # the runtime itself writes the checkpoint
            number = int(system["errno"])
            raise OSError(number, os.strerror(number)) from error
        if known is None:
            raise InputError(
                f"model: expected one that onnxruntime-training {onnxruntime.__version__} can differentiate, "
                f"found {complaint(error)} (nothing was written)"
            ) from error
        raise _no_gradient(graph, known["operator"].removesuffix("Grad"), known["node"]) from error


def _no_gradient(graph: ForwardGraph, operator: str, node: str) -> InputError:
    return InputError(
        f"{graph.place_of(node)}: expected operators with a gradient in onnxruntime-training "
        f"{onnxruntime.__version__}, found {operator}, which has none; replace it (nothing was written)"
    )


_SYSTEM_ERROR = re.compile(r"errno:(?P<errno>\d+)")
_NO_GRADIENT = re.compile(r"gradient builder has not been registered: (?P<operator>\w+) for node (?P<node>\S+)")
_NO_KERNEL = re.compile(r"implementation for (?P<operator>\w+)\(\d+\) node with name '(?P<node>[^']*?)_Grad/")


def _optimizer_block(constants: Mapping[str, Any]) -> Any:
    """Block of an optimizer; None, and so no `optimizer_model.onnx`, for SGD with momentum, which the runtime lacks."""
    if constants["name"] == "sgd":
        return None if constants["momentum"] else onnxblock.optim.SGD()
    return onnxblock.optim.AdamW(
        betas=tuple(constants["betas"]), eps=constants["eps"], weight_decay=constants["weight_decay"]
    )


class _Losses(onnxblock.Block):  # type: ignore[misc]
    """Losses of the heads, of plain operators; the labels become inputs of the graph.

    With several heads, `share` [H] becomes an input as well: the shares of a micro-batch by which their losses are
    multiplied before they are added up. The losses themselves [H] are the value `LOSSES`.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = heads

    def add_labels(self) -> None:
        """Add the labels to the inputs of the graph."""
        inputs = self.base.graph.input
        batch = inputs[0].type.tensor_type.shape.dim[0].dim_param
        for label in (head.label for head in self.heads):
            if all(label.name != info.name for info in inputs):
                dtype = helper.np_dtype_to_tensor_dtype(np.dtype(label.dtype))
                inputs.append(helper.make_tensor_value_info(label.name, dtype, (batch, *label.shape)))

    def build(self, *_: str) -> str:
        self.add_labels()
        specs = [spec for head in self.heads for spec in (head.output, head.label)]
        graph = Graph(Trace({spec.name: (Batch(), *spec.shape) for spec in specs}, {}, {}))
        losses, _gradients = append_losses(graph, self.heads)
        proto = self.base.graph
        if len(self.heads) == 1:
            graph.define("loss", "Identity", losses)
        else:
            shape = (len(self.heads),)
            proto.input.append(helper.make_tensor_value_info(SHARE, TensorProto.FLOAT, shape))
            proto.value_info.append(helper.make_tensor_value_info(LOSSES, TensorProto.FLOAT, shape))
            graph.define(LOSSES, "Identity", losses)
            graph.define("loss", "ReduceSum", graph.op("Mul", LOSSES, SHARE), keepdims=0)
        nodes = needed(graph.nodes, ["loss"])
        proto.node.extend(nodes)
        proto.initializer.extend(initializers_of(nodes, graph.initializers))
        return "loss"


class _CrossEntropy(_Losses):
    """Loss of outputs [B, C, ...] and labels [B, ...]; onnxruntime's own takes the last axis for the classes."""

    def build(self, *_: str) -> str:
        self.add_labels()
        (head,) = self.heads
        inputs, outputs = [head.output.name, head.label.name], ["loss", "cross_entropy.log_prob"]
        self.base.graph.node.append(
            helper.make_node("SoftmaxCrossEntropyLoss", inputs, outputs, name="cross_entropy", reduction="mean")
        )
        return "loss"


class _MeanSquaredError(_Losses):
    def build(self, *_: str) -> str:
        (head,) = self.heads
        return onnxblock.loss.MSELoss()(head.output.name, head.label.name)  # type: ignore[no-any-return]


class _BinaryCrossEntropy(_Losses):
    """Loss mean(relu(z) - z y + log(1 + exp(-|z|))); onnxruntime's own takes log(sigmoid(z)), -inf for large |z|."""

    def build(self, *_: str) -> str:
        self.add_labels()
        (head,) = self.heads
        graph, output, label = self.base.graph, head.output.name, head.label.name
        graph.initializer.append(helper.make_tensor("bce.one", TensorProto.FLOAT, [], [1.0]))
        steps = [
            ("Relu", [output], "bce.relu"),
            ("Mul", [output, label], "bce.product"),
            ("Sub", ["bce.relu", "bce.product"], "bce.linear"),
            ("Abs", [output], "bce.abs"),
            ("Neg", ["bce.abs"], "bce.neg"),
            ("Exp", ["bce.neg"], "bce.exp"),
            ("Add", ["bce.exp", "bce.one"], "bce.sum"),
            ("Log", ["bce.sum"], "bce.log"),
            ("Add", ["bce.linear", "bce.log"], "bce.each"),
        ]
        graph.node.extend(helper.make_node(kind, inputs, [name], name=name) for kind, inputs, name in steps)
        graph.node.append(helper.make_node("ReduceMean", ["bce.each"], ["loss"], name="bce.mean", keepdims=0))
        return "loss"


_BLOCKS: dict[str, type[_Losses]] = {
    "cross_entropy": _CrossEntropy,
    "mse": _MeanSquaredError,
    "bce": _BinaryCrossEntropy,
}
"""Blocks of single losses without options."""


def _loss_block(heads: Sequence[Head]) -> _Losses:
    plain = str(heads[0].loss) if len(heads) == 1 else ""
    return _BLOCKS.get(plain, _Losses)(heads)
