"""LSTM and GRU and their gradients: products over all steps at once, and a Scan over time for the rest.

A node becomes ordinary nodes and, in each direction, a recurrence, which takes what the inputs add to the gates. Its
Scan keeps the activated gates of every step for the backward pass, a Scan in the opposite direction; the gradient of
the recurrent weights is again a product over all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from export.forward.tracing import Batch, Dim, Shape
from export.gradients.builder import Graph, attributes
from export.gradients.rules import Gradients, rule

LSTM, GRU = "LSTMRecurrence", "GRURecurrence"
"""Operators of the nodes that `split` makes, which exist only between the forward graph and its lowering.

Inputs: what the inputs add to the gates [T, B, GH]; recurrent weights [GH, H] and biases [GH] or ""; the state before
the first step, and an LSTM's cells, [B, H] or "". Outputs: the states [T, B, H]; the state after the last step, and the
cells. Gates are in ONNX's order; with `reverse` the last step comes first.
"""

_OPERATORS = {"LSTM": LSTM, "GRU": GRU}
_Results = tuple[list[str], list[str]]


@dataclass(frozen=True)
class _Cell:
    """One step of a recurrence, to be appended to the body of a Scan.

    Attributes:
        forward: Function of the transposed weights, the biases, H, what the input adds to the gates, and the states;
            returns the new states and what is kept.
        backward: Function of the weights, H, what was kept, and the gradients of the new states; returns the gradients
            of the states, of what the input adds to the gates and, if that differs, of what the state adds to them.
        kept: Names of what is kept, the state before the step first.
        additions: Number of gradients of additions to the gates that `backward` returns.
    """

    forward: Callable[[Graph, str, str, int, str, list[str]], _Results]
    backward: Callable[[Graph, str, int, list[str], list[str]], _Results]
    kept: tuple[str, ...]
    additions: int


def split(graph: Graph, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Replace every LSTM and GRU that computes what torch's does with recurrences and ordinary nodes."""
    return [part for node in nodes for part in (_parts(graph, node) if _matches_torch(graph, node) else [node])]


def forward(graph: Graph, node: NodeProto) -> None:
    """Append a recurrence, whose values kept for the gradient are named after its first output."""
    (gates, weights, bias, *first), (y, *last) = node.input, node.output
    cell, hidden = _CELLS[node.op_type], _static(graph.shape(weights)[1])
    transposed = graph.transpose(weights, [1, 0])

    def step(body: Graph, states: list[str], inputs: list[str]) -> _Results:
        new, kept = cell.forward(body, transposed, bias, hidden, inputs[0], states)
        return new, [new[0], *kept]

    states = [state or _zeros(graph, gates, hidden) for state in first]
    outputs = [*last, y, *(f"{y}.{name}" for name in cell.kept)]
    _scan(graph, step, states, [gates], outputs, backwards=attributes(node)["reverse"])


@rule(LSTM, GRU)
def recurrence(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gates, weights, bias, *_), y = node.input, node.output[0]
    (grad_all, *grad_last), cell, hidden = gradients, _CELLS[node.op_type], _static(graph.shape(weights)[1])

    def step(body: Graph, states: list[str], inputs: list[str]) -> _Results:
        if grad_all:
            states = [body.op("Add", states[0], inputs.pop()), *states[1:]]
        return cell.backward(body, weights, hidden, inputs, states)

    states = [gradient or _zeros(graph, gates, hidden) for gradient in grad_last]
    kept = [f"{y}.{name}" for name in cell.kept]
    outputs = [graph.name("gradient") for _ in range(len(states) + cell.additions)]
    inputs = [*kept, grad_all] if grad_all else kept
    _scan(graph, step, states, inputs, outputs, backwards=not attributes(node)["reverse"])
    rows = graph.op("Reshape", outputs[-1], graph.ints(-1, _static(graph.shape(weights)[0])))
    before = graph.op("Reshape", kept[0], graph.ints(-1, hidden))
    grad_weights = graph.op("Gemm", rows, before, transA=1) if weights in graph.wanted else None
    grad_bias = graph.sum(rows, [0]) if bias in graph.wanted else None
    return [outputs[len(states)], grad_weights, grad_bias, *outputs[: len(states)]]


def _lstm(body: Graph, weights: str, bias: str, hidden: int, gates: str, states: list[str]) -> _Results:
    """Step of an LSTM: i, o and f are sigmoids, g is a hyperbolic tangent; c' = f c + i g and h' = o tanh(c')."""
    h, c = states
    total = body.op("Gemm", h, weights, gates)
    gating, g = body.ops("Split", total, body.ints(3 * hidden, hidden), outputs=2, axis=1)
    gating, g = body.op("Sigmoid", gating), body.op("Tanh", g)
    i, o, f = body.ops("Split", gating, body.ints(hidden, hidden, hidden), outputs=3, axis=1)
    new = body.op("Add", body.op("Mul", f, c), body.op("Mul", i, g))
    squashed = body.op("Tanh", new)
    return [body.op("Mul", o, squashed), new], [h, body.op("Concat", gating, g, axis=1), c, squashed]


def _lstm_backward(body: Graph, weights: str, hidden: int, kept: list[str], gradients: list[str]) -> _Results:
    """Backward step of an LSTM; the slope of a sigmoid is s (1 - s), that of a hyperbolic tangent (1 + t) (1 - t)."""
    (_, active, c, squashed), (grad_h, grad_c) = kept, gradients
    one = body.scalar(1.0)
    i, o, f, g = body.ops("Split", active, body.ints(*[hidden] * 4), outputs=4, axis=1)
    slope = body.op("Mul", o, body.op("Sub", one, body.op("Mul", squashed, squashed)))
    grad_c = body.op("Add", grad_c, body.op("Mul", grad_h, slope))
    outer = body.op("Concat", grad_c, grad_h, grad_c, grad_c, axis=1)
    factors = body.op("Concat", g, squashed, c, i, axis=1)
    shift = body.array(np.repeat(np.array([0, 1], np.float32), [3 * hidden, hidden]))
    slopes = body.op("Mul", body.op("Add", active, shift), body.op("Sub", one, active))
    grad_gates = body.op("Mul", body.op("Mul", outer, factors), slopes)
    return [body.op("MatMul", grad_gates, weights), body.op("Mul", grad_c, f)], [grad_gates]


def _gru(body: Graph, weights: str, bias: str, hidden: int, gates: str, states: list[str]) -> _Results:
    """Step of a GRU: z and r are sigmoids, n = tanh(x + r s) for input x and state s; h' = n + z (h - n)."""
    (h,), sizes = states, body.ints(2 * hidden, hidden)
    own = body.op("Gemm", h, weights, *([bias] if bias else []))
    (zr, x), (own, s) = (body.ops("Split", value, sizes, outputs=2, axis=1) for value in (gates, own))
    zr = body.op("Sigmoid", body.op("Add", zr, own))
    z, r = body.ops("Split", zr, body.ints(hidden, hidden), outputs=2, axis=1)
    n = body.op("Tanh", body.op("Add", x, body.op("Mul", r, s)))
    return [body.op("Add", n, body.op("Mul", z, body.op("Sub", h, n)))], [h, zr, n, s]


def _gru_backward(body: Graph, weights: str, hidden: int, kept: list[str], gradients: list[str]) -> _Results:
    (h, zr, n, s), (grad_h,), one = kept, gradients, body.scalar(1.0)
    z, r = body.ops("Split", zr, body.ints(hidden, hidden), outputs=2, axis=1)
    direct = body.op("Mul", grad_h, z)
    slope = body.op("Sub", one, body.op("Mul", n, n))
    grad_n = body.op("Mul", body.op("Sub", grad_h, direct), slope)
    outer = body.op("Concat", body.op("Mul", grad_h, body.op("Sub", h, n)), body.op("Mul", grad_n, s), axis=1)
    grad_zr = body.op("Mul", outer, body.op("Mul", zr, body.op("Sub", one, zr)))
    grad_own = body.op("Concat", grad_zr, body.op("Mul", grad_n, r), axis=1)
    return [body.op("Gemm", grad_own, weights, direct)], [body.op("Concat", grad_zr, grad_n, axis=1), grad_own]


_CELLS = {
    LSTM: _Cell(_lstm, _lstm_backward, ("before", "active", "cells", "squashed"), additions=1),
    GRU: _Cell(_gru, _gru_backward, ("before", "active", "new", "own"), additions=2),
}


def _scan(
    graph: Graph,
    step: Callable[[Graph, list[str], list[str]], _Results],
    states: Sequence[str],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    backwards: bool,
) -> None:
    """Append a Scan over the first axis: `step` makes new states and outputs from states and the inputs of one step."""
    body = graph.branch()
    read = [graph.name("step") for _ in (*states, *inputs)]
    new, scanned = step(body, read[: len(states)], read[len(states) :])
    written: list[str] = []
    for value in (*new, *scanned):  # each has to be a distinct value
        written.append(body.op("Identity", value) if value in read or value in written else value)
    info = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=(None, None))
    graph.nodes.append(
        helper.make_node(
            "Scan",
            [*states, *inputs],
            list(outputs),
            name=outputs[0],
            body=helper.make_graph(body.nodes, "step", [*map(info, read)], [*map(info, written)]),
            num_scan_inputs=len(inputs),
            scan_input_directions=[int(backwards)] * len(inputs),
            scan_output_directions=[int(backwards)] * len(scanned),
        )
    )


def _parts(graph: Graph, node: NodeProto) -> list[NodeProto]:
    """Nodes that `split` puts in place of an LSTM or GRU."""
    x, w, r, b, _, *first = [*node.input, "", "", "", ""][: 7 if node.op_type == "LSTM" else 6]
    (time, batch, size), (directions, gates, hidden) = graph.shape(x), graph.shape(r)
    parts, count = graph.branch(), _static(directions)
    rows = _product(time, batch)
    flat = _reshaped(parts, x, (rows, size))
    biases = _pieces(parts, _reshaped(parts, b, (2 * count, gates)) if b else "", 2 * count)
    others = [_pieces(parts, value, count) for value in (w, r, *first)]
    results = []
    for number, (input_weights, state_weights, *states) in enumerate(zip(*others, strict=True)):
        bias, inner = biases[2 * number : 2 * number + 2]
        if bias and node.op_type == "LSTM":
            bias, inner = _op(parts, (gates,), "Add", bias, inner), ""
        added = _op(parts, (rows, gates), "Gemm", flat, input_weights, *([bias] if bias else []), transB=1)
        added = _reshaped(parts, added, (time, batch, gates))
        outputs = [parts.name(node.op_type) for _ in range(1 + len(states))]
        for output in outputs:
            parts.set_shape(output, (time, batch, hidden) if output == outputs[0] else (batch, hidden))
        reverse = number == 1 or attributes(node).get("direction", "forward") == "reverse"
        inputs = [added, state_weights, inner, *states]
        made = helper.make_node(_OPERATORS[node.op_type], inputs, outputs, name=node.name, reverse=int(reverse))
        parts.nodes.append(made)
        results.append(outputs)
    for index, output in enumerate(node.output):
        if output:
            axis, shape = (1, (time, 1, batch, hidden)) if index == 0 else (0, (1, batch, hidden))
            joined = [_op(parts, shape, "Unsqueeze", outputs[index], parts.ints(axis)) for outputs in results]
            parts.define(output, "Concat", *joined, axis=axis)
    return parts.nodes


def _matches_torch(graph: Graph, node: NodeProto) -> bool:
    """Whether a node has torch's formulas, all sequences of one length, and the time as its first axis."""
    if node.op_type not in _OPERATORS:
        return False
    given = attributes(node)
    own = given.pop("linear_before_reset", 0) == 1 or node.op_type == "LSTM"
    other = [name for name, value in given.items() if value and name not in ("hidden_size", "direction")]
    lengths, peepholes = node.input[4:5], node.input[7:]
    growing = [size for size in graph.shape(node.input[0]) if isinstance(size, Batch)]
    return own and not other and not any(lengths) and not any(peepholes) and len(growing) == 1


def _op(graph: Graph, shape: Shape, operator: str, *inputs: str, **attributes: Any) -> str:
    """Append a node whose output has a known shape."""
    value = graph.op(operator, *inputs, **attributes)
    graph.set_shape(value, shape)
    return value


def _reshaped(graph: Graph, value: str, shape: Shape) -> str:
    reshaped = graph.reshape(value, shape)
    graph.set_shape(reshaped, shape)
    return reshaped


def _pieces(graph: Graph, value: str, count: int) -> list[str]:
    """Entries of the first axis one by one, each "" if the value is ""."""
    if not value:
        return [""] * count
    shape = graph.shape(value)[1:]
    pieces = graph.ops("Split", value, graph.ints(*[1] * count), outputs=count, axis=0)
    for piece in pieces:
        graph.set_shape(piece, (1, *shape))
    return [_op(graph, shape, "Squeeze", piece, graph.ints(0)) for piece in pieces]


def _zeros(graph: Graph, gates: str, hidden: int) -> str:
    """State [B, H] of zeros."""
    batch = graph.op("Shape", gates, start=1, end=2)
    zero = TensorProto(dims=[1], data_type=TensorProto.FLOAT, float_data=[0.0])
    return graph.op("ConstantOfShape", graph.op("Concat", batch, graph.ints(hidden), axis=0), value=zero)


def _product(a: Dim, b: Dim) -> Dim:
    if isinstance(a, Batch):
        return Batch(a.factor * _static(b))
    return Batch(a * b.factor) if isinstance(b, Batch) else a * b


def _static(size: Dim) -> int:
    assert isinstance(size, int)
    return size
