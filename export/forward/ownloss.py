"""Losses of the user's own: loaded, traced, and put into the graph of the forward pass behind the outputs.

The labels become inputs of that graph, and the loss one of its values, so that engines differentiate it as they do the
model itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper

from export.complaints import gist
from export.forward.graph import OPSET, ForwardGraph, finish, quiet_stderr
from export.forward.translations import TRANSLATIONS
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import Head
from fedpara_edge.losses import Loss, OwnLoss
from fedpara_edge.nn.load import load_loss

_CLOSE = 1e-4
_ROWS = (4, 2)


@dataclass(frozen=True, kw_only=True)
class LoadedLoss(OwnLoss):
    """Loss of the user's own with its module.

    Args:
        module: Module from outputs and labels to a number.
    """

    module: torch.nn.Module


def loaded(loss: Loss) -> Loss:
    """A loss of the user's own with its module, and with no more than its name; any other loss as it is.

    Raises:
        InputError: Its reference leads to none.
    """
    if not isinstance(loss, OwnLoss):
        return loss
    name = loss.function.rpartition(":")[2]
    return LoadedLoss(weight=loss.weight, function=name, kind=loss.kind, module=load_loss(loss.function))


def by_name(head: Head) -> Head:
    """A head whose own loss is known by its name alone, as it stands in files and is told to another process."""
    if not isinstance(head.loss, LoadedLoss):
        return head
    fields = {field.name: getattr(head.loss, field.name) for field in dataclasses.fields(OwnLoss)}
    return replace(head, loss=OwnLoss(**fields))


def own_value(output: str) -> str:
    """Name in the graph of the own loss of an output."""
    return f"loss.{output}"


def with_own_losses(
    graph: ForwardGraph, heads: Sequence[Head], labels: Mapping[str, NDArray[Any]]
) -> tuple[ForwardGraph, tuple[Head, ...]]:
    """The graph with the own losses of heads, and these heads, each knowing whether its loss is a mean over rows.

    Args:
        graph: Forward pass.
        heads: Outputs to train, with their labels and losses.
        labels: Labels [B, ...] by name, with B of at least 4.

    Raises:
        InputError: A loss is not a number, or can't be exported.
    """
    if not any(isinstance(head.loss, LoadedLoss) for head in heads):
        return graph, tuple(heads)
    found = []
    for head in heads:
        if isinstance(head.loss, LoadedLoss):
            outputs = torch.randn(len(labels[head.label.name]), *head.output.shape)
            mean = _is_mean(head.loss, outputs, torch.from_numpy(labels[head.label.name]))
            head = replace(head, loss=replace(head.loss, mean=mean))
        found.append(head)
    evaluation = None if graph.evaluation is None else _with_losses(graph.evaluation, found, labels)
    return replace(graph, model=_with_losses(graph.model, found, labels), evaluation=evaluation), tuple(found)


def _with_losses(model: onnx.ModelProto, heads: Sequence[Head], labels: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """A copy of a model with the labels as inputs and the own losses of heads as values."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    batch = result.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for label in (head.label for head in heads):
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(label.dtype))
        result.graph.input.append(helper.make_tensor_value_info(label.name, dtype, (batch, *label.shape)))
    for head in heads:
        if isinstance(head.loss, LoadedLoss):
            outputs = torch.randn(len(labels[head.label.name]), *head.output.shape)
            _append(result.graph, head, outputs, torch.from_numpy(labels[head.label.name]))
    return result


def _is_mean(loss: LoadedLoss, outputs: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether a loss is a mean over rows, on random outputs.

    Raises:
        InputError: The loss is not one floating number.
    """

    def value(start: int, end: int) -> float:
        found = loss.module(outputs[start:end], y[start:end])
        if not isinstance(found, torch.Tensor) or found.dim() or not found.is_floating_point():
            shown = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(f"{loss.function}: expected one floating number, found {shown}; take its mean", key="loss")
        return found.item()

    try:
        whole, first, last = value(0, 4), value(0, 1), value(1, 4)
    except InputError:
        raise
    except Exception as error:  # of the user's own code
        taken = f"outputs {list(outputs.shape)} and labels {y.dtype} {list(y.shape)}"
        remedy = "; for classes as labels, add :kind=classes" if loss.kind == "numbers" else ""
        raise InputError(
            f"{loss.function}: expected to take {taken}, found {gist(error)}{remedy}", key="loss"
        ) from error
    return abs(whole - (first + 3 * last) / 4) <= _CLOSE * abs(whole)


def _append(graph: onnx.GraphProto, head: Head, outputs: torch.Tensor, y: torch.Tensor) -> None:
    assert isinstance(head.loss, LoadedLoss)
    names, prefix = (head.output.name, head.label.name), f"{own_value(head.output.name)}."
    rows = torch.export.Dim("batch")
    try:
        with quiet_stderr():
            program = torch.onnx.export(
                head.loss.module,
                (outputs, y),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=list(names),
                output_names=[own_value(head.output.name)],
                dynamic_shapes=({0: rows}, {0: rows}),
                custom_translation_table=dict(TRANSLATIONS),
                verbose=False,
            )
            assert program is not None
            own = finish(program.model_proto, {}, {}).model.graph
    except Exception as error:  # whatever goes wrong here lies in the user's loss
        raise InputError(
            f"{head.loss.function}: expected a loss that torch.onnx can export, found {gist(error)}", key="loss"
        ) from error
    kept = {*names, own_value(head.output.name), ""}
    for tensor in own.initializer:
        tensor.name = f"{prefix}{tensor.name}"
        graph.initializer.add().CopyFrom(tensor)
    for node in own.node:
        node.name = f"{prefix}{node.name}"
        node.input[:] = [name if name in kept else f"{prefix}{name}" for name in node.input]
        node.output[:] = [name if name in kept else f"{prefix}{name}" for name in node.output]
        graph.node.add().CopyFrom(node)
