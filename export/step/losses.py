"""Losses of a training step, with their gradients with respect to the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from export.gradients import Graph
from fedpara_edge.formats.interface import Head

LossBuilder = Callable[[Graph, str, str], tuple[str, str]]
"""Function from outputs [B, ...] and labels to the mean loss [] and its gradient by the outputs [B, ...]."""


def cross_entropy(graph: Graph, outputs: str, labels: str) -> tuple[str, str]:
    """Mean over all labels of -log softmax(outputs)[label], for outputs [B, C, ...] and labels int64 [B, ...]."""
    classes = graph.shape(outputs)[1]
    log_p = graph.op("LogSoftmax", outputs, axis=1)
    values = graph.array(np.array([0.0, 1.0], np.float32))
    chosen = graph.op("OneHot", labels, graph.array(np.array(classes, np.int64)), values, axis=1)
    count = _count(graph, labels)
    label_log_p = graph.op(
        "Where", graph.op("Cast", chosen, to=TensorProto.BOOL), log_p, graph.scalar(0.0)
    )  # not -inf · 0
    loss = graph.op("Neg", graph.op("Div", _total(graph, label_log_p), count))
    return loss, graph.op("Div", graph.op("Sub", graph.op("Exp", log_p), chosen), count)


def mse(graph: Graph, outputs: str, labels: str) -> tuple[str, str]:
    """Mean of (outputs - labels)²."""
    difference = graph.op("Sub", outputs, labels)
    count = _count(graph, outputs)
    loss = graph.op("Div", _total(graph, graph.op("Mul", difference, difference)), count)
    return loss, graph.op("Div", graph.op("Mul", difference, graph.scalar(2.0)), count)


def bce(graph: Graph, outputs: str, labels: str) -> tuple[str, str]:
    """Mean of relu(z) - z y + log(1 + exp(-|z|)), finite for every logit z."""
    count = _count(graph, outputs)
    linear = graph.op("Sub", graph.op("Relu", outputs), graph.op("Mul", outputs, labels))
    decay = graph.op("Exp", graph.op("Neg", graph.op("Abs", outputs)))
    terms = graph.op("Add", linear, graph.op("Log", graph.op("Add", decay, graph.scalar(1.0))))
    loss = graph.op("Div", _total(graph, terms), count)
    return loss, graph.op("Div", graph.op("Sub", graph.op("Sigmoid", outputs), labels), count)


LOSSES: dict[str, LossBuilder] = {"cross_entropy": cross_entropy, "mse": mse, "bce": bce}


def append_losses(graph: Graph, heads: Sequence[Head], share: str | None = None) -> tuple[str, dict[str, str]]:
    """Append the losses of the heads; return the loss, and the gradients of the outputs by their names.

    Args:
        graph: Graph with the outputs.
        heads: Outputs to train, with their labels and losses.
        share: Name of the share of this micro-batch, by which the gradients are multiplied; None for 1.
    """
    (head,) = heads
    loss, gradient = LOSSES[head.loss.name](graph, head.output.name, head.label.name)
    return loss, {head.output.name: gradient if share is None else graph.op("Mul", gradient, share)}


def _count(graph: Graph, value: str) -> str:
    """Number of entries, as a float32 scalar."""
    return graph.op("Cast", graph.op("Size", value), to=TensorProto.FLOAT)


def _total(graph: Graph, value: str) -> str:
    return graph.op("ReduceSum", value, keepdims=0)
