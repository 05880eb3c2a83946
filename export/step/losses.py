"""Losses of a training step, with their gradients with respect to the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from export.forward.ownloss import own_value
from export.gradients import Graph
from fedpara_edge.formats.interface import Head
from fedpara_edge.losses import BinaryCrossEntropy, CrossEntropy, Huber, OwnLoss

LossBuilder = Callable[[Graph, Any, str, str], tuple[str, str]]
"""Function from a loss, outputs [B, ...] and labels to the mean loss [] and its gradient by the outputs [B, ...]."""


def cross_entropy(graph: Graph, loss: CrossEntropy, outputs: str, labels: str) -> tuple[str, str]:
    """Mean of -Σ t log softmax(outputs) over what counts; its gradient is softmax(outputs) Σ t - t, over the same.

    t [B, C, ...] is 1 at the label and 0 elsewhere, or what class weights, smoothing and ignored labels make of that.
    """
    log_p = graph.op("LogSoftmax", outputs, axis=1)
    targets, count, total = _targets(graph, loss, outputs, labels)
    values = log_p if total is None else graph.op("Mul", log_p, targets)
    label_log_p = graph.op(
        "Where", graph.op("Cast", targets, to=TensorProto.BOOL), values, graph.scalar(0.0)
    )  # not -inf · 0
    value = graph.op("Neg", graph.op("Div", _total(graph, label_log_p), count))
    p = graph.op("Exp", log_p)
    expected = p if total is None else graph.op("Mul", p, total)
    return value, graph.op("Div", graph.op("Sub", expected, targets), count)


def _targets(graph: Graph, loss: CrossEntropy, outputs: str, labels: str) -> tuple[str, str, str | None]:
    """Targets t [B, C, ...], the count [] to divide by, and Σ t over the classes [B, 1, ...]; None where that is 1."""
    shape = graph.shape(outputs)
    classes = shape[1]
    values, depth = graph.array(np.array([0.0, 1.0], np.float32)), graph.array(np.array(classes, np.int64))
    if loss.ignore_index is None and not loss.class_weights and not loss.label_smoothing:
        chosen = graph.op("OneHot", labels, depth, values, axis=1)
        return chosen, _count(graph, labels), None
    weights: str | None = None
    counting: str | None = None
    if loss.ignore_index is not None:
        ignored = graph.op("Equal", labels, graph.array(np.array(loss.ignore_index, np.int64)))
        labels = graph.op("Where", ignored, graph.array(np.array(0, np.int64)), labels)
        counting = graph.op("Cast", graph.op("Not", ignored), to=TensorProto.FLOAT)
    targets = graph.op("OneHot", labels, depth, values, axis=1)
    if loss.class_weights:
        spread = np.array(loss.class_weights, np.float32)
        weights = graph.array(spread.reshape(-1, *[1] * (len(shape) - 2)))
        targets = graph.op("Mul", targets, weights)
    counts = targets if counting is None else graph.op("Mul", targets, graph.op("Unsqueeze", counting, graph.ints(1)))
    count = _total(graph, counts)
    if loss.label_smoothing:
        share = loss.label_smoothing / int(classes)  # type: ignore[arg-type]
        even = graph.scalar(share) if weights is None else graph.op("Mul", weights, graph.scalar(share))
        targets = graph.op("Add", graph.op("Mul", targets, graph.scalar(1 - loss.label_smoothing)), even)
    if counting is not None:
        targets = graph.op("Mul", targets, graph.op("Unsqueeze", counting, graph.ints(1)))
    positive = graph.op("Greater", count, graph.scalar(0.0))
    count = graph.op("Where", positive, count, graph.scalar(1.0))  # of ignored labels alone
    return targets, count, graph.sum(targets, [1], keepdims=True)


def mse(graph: Graph, loss: object, outputs: str, labels: str) -> tuple[str, str]:
    """Mean of (outputs - labels)²."""
    del loss
    difference = graph.op("Sub", outputs, labels)
    count = _count(graph, outputs)
    value = graph.op("Div", _total(graph, graph.op("Mul", difference, difference)), count)
    return value, graph.op("Div", graph.op("Mul", difference, graph.scalar(2.0)), count)


def l1(graph: Graph, loss: object, outputs: str, labels: str) -> tuple[str, str]:
    """Mean of |outputs - labels|."""
    del loss
    difference = graph.op("Sub", outputs, labels)
    count = _count(graph, outputs)
    value = graph.op("Div", _total(graph, graph.op("Abs", difference)), count)
    return value, graph.op("Div", graph.op("Sign", difference), count)


def huber(graph: Graph, loss: Huber, outputs: str, labels: str) -> tuple[str, str]:
    """Mean of c (d - ½ c), with d = outputs - labels and c = d cut off at ±δ; its gradient is c."""
    difference = graph.op("Sub", outputs, labels)
    cut = graph.op("Max", graph.op("Min", difference, graph.scalar(loss.delta)), graph.scalar(-loss.delta))
    terms = graph.op("Mul", cut, graph.op("Sub", difference, graph.op("Mul", cut, graph.scalar(0.5))))
    count = _count(graph, outputs)
    return graph.op("Div", _total(graph, terms), count), graph.op("Div", cut, count)


def bce(graph: Graph, loss: BinaryCrossEntropy, outputs: str, labels: str) -> tuple[str, str]:
    """Mean of relu(z) - z y + log(1 + exp(-|z|)), finite for every logit z, with yes weighted by p."""
    count = _count(graph, outputs)
    linear = graph.op("Sub", graph.op("Relu", outputs), graph.op("Mul", outputs, labels))
    decay = graph.op("Exp", graph.op("Neg", graph.op("Abs", outputs)))
    softplus = graph.op("Log", graph.op("Add", decay, graph.scalar(1.0)))
    terms = graph.op("Add", linear, softplus)
    more = None if loss.pos_weight == 1 else graph.op("Mul", labels, graph.scalar(loss.pos_weight - 1))
    if more is not None:  # (p - 1) y log(1 + exp(-z))
        positive = graph.op("Add", softplus, graph.op("Relu", graph.op("Neg", outputs)))
        terms = graph.op("Add", terms, graph.op("Mul", more, positive))
    value = graph.op("Div", _total(graph, terms), count)
    slope = graph.op("Sub", graph.op("Sigmoid", outputs), labels)
    if more is not None:
        slope = graph.op("Sub", slope, graph.op("Mul", more, graph.op("Sigmoid", graph.op("Neg", outputs))))
    return value, graph.op("Div", slope, count)


def own(graph: Graph, loss: object, outputs: str, labels: str) -> tuple[str, str]:
    """Loss that is in the graph already, behind the outputs; its gradient by itself is 1."""
    del loss, labels
    return own_value(outputs), graph.scalar(1.0)


LOSSES: dict[str, LossBuilder] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "bce": bce,
    "own": own,
}


def append_losses(graph: Graph, heads: Sequence[Head], share: str | None = None) -> tuple[str, dict[str, str]]:
    """Append the losses of the heads; return them, and the gradients of the outputs, or of own losses, by name.

    Args:
        graph: Graph with the outputs.
        heads: Outputs to train, with their labels and losses.
        share: Name of the share of this micro-batch, by which the gradients are multiplied, [] or for several heads
            [H]; None for 1.

    Returns:
        Losses, each times its weight, [] or for several heads [H]; and the gradients by output or own loss.
    """
    values, gradients = [], {}
    for number, head in enumerate(heads):
        value, gradient = LOSSES[head.loss.name](graph, head.loss, head.output.name, head.label.name)
        if head.loss.weight != 1:
            weight = graph.scalar(head.loss.weight)
            value, gradient = graph.op("Mul", value, weight), graph.op("Mul", gradient, weight)
        if share is not None:
            own = share if len(heads) == 1 else graph.op("Gather", share, graph.array(np.array(number, np.int64)))
            gradient = graph.op("Mul", gradient, own)
        values.append(value)
        gradients[own_value(head.output.name) if isinstance(head.loss, OwnLoss) else head.output.name] = gradient
    if len(heads) == 1:
        return values[0], gradients
    return graph.op("Concat", *(graph.op("Reshape", value, graph.ints(1)) for value in values), axis=0), gradients


def _count(graph: Graph, value: str) -> str:
    """Number of entries, as a float32 scalar."""
    return graph.op("Cast", graph.op("Size", value), to=TensorProto.FLOAT)


def _total(graph: Graph, value: str) -> str:
    return graph.op("ReduceSum", value, keepdims=0)
