"""Optimizers: their constants, their state, and their update as ONNX operators on one vector of all weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

from export.gradients import Graph

CORRECTION = "jacobian_correction"
"""Key of the Jacobian correction's λ (`export.step.jacobian`) among an optimizer's constants; left out for none."""

DECAY = "frobenius_decay"
"""Key of the Frobenius decay's λ (`export.step.frobenius`) among an optimizer's constants; left out for none."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "momentum": 0.0},
    "adamw": {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
}


def optimizer_constants(
    name: str, *, jacobian_correction: float = 0.0, frobenius_decay: float = 0.0, **constants: Any
) -> dict[str, Any]:
    """Constants of an optimizer, with torch's defaults where none are given.

    Args:
        name: Optimizer, a key of `DEFAULTS`.
        jacobian_correction: λ of the Jacobian correction; 0 for none.
        frobenius_decay: λ of the Frobenius decay; 0 for none.
        constants: Constants that differ from the defaults.

    >>> optimizer_constants("adamw", weight_decay=0.1)["weight_decay"]
    0.1
    """
    of_weights = {CORRECTION: jacobian_correction, DECAY: frobenius_decay}
    return {**DEFAULTS[name], **constants, **{option: strength for option, strength in of_weights.items() if strength}}


def state_shapes(constants: Mapping[str, Any], parameters: int) -> dict[str, tuple[int, ...]]:
    """Shapes of an optimizer's state, float32, zero before the first step.

    >>> state_shapes(optimizer_constants("adamw"), 7)
    {'moment1': (7,), 'moment2': (7,), 'steps': ()}
    """
    if constants["name"] == "sgd":
        return {"momentum": (parameters,)} if constants["momentum"] else {}
    return {"moment1": (parameters,), "moment2": (parameters,), "steps": ()}


def append_update(
    graph: Graph, constants: Mapping[str, Any], weights: str, gradient: str, learning_rate: str
) -> dict[str, str]:
    """Append one step of an optimizer, whose state is held in graph inputs under the names of `state_shapes`.

    Every value that is updated is read before its replacement is written, so that the two may share memory.

    Returns:
        Names of the new `weights` and the new state.
    """
    return _UPDATES[constants["name"]](graph, constants, weights, gradient, learning_rate)


def _sgd(graph: Graph, constants: Mapping[str, Any], weights: str, gradient: str, rate: str) -> dict[str, str]:
    """Step of torch.optim.SGD with dampening 0: m' = momentum · m + g, w' = w - rate · m'."""
    new = {}
    if constants["momentum"]:
        kept = graph.op("Mul", "momentum", graph.scalar(constants["momentum"]))
        gradient = new["momentum"] = graph.op("Add", kept, gradient)
    return {"weights": graph.op("Sub", weights, graph.op("Mul", gradient, rate)), **new}


def _adamw(graph: Graph, constants: Mapping[str, Any], weights: str, gradient: str, rate: str) -> dict[str, str]:
    """Step of torch.optim.AdamW, with the bias corrections in double precision."""
    beta1, beta2 = constants["betas"]
    steps = graph.op("Add", "steps", graph.scalar(1.0))
    moment1 = _mixed(graph, "moment1", gradient, beta1)
    moment2 = _mixed(graph, "moment2", graph.op("Mul", gradient, gradient), beta2)
    rate1 = graph.op("Div", rate, _correction(graph, beta1, steps, root=False))
    deviation = graph.op("Div", graph.op("Sqrt", moment2), _correction(graph, beta2, steps, root=True))
    direction = graph.op("Div", moment1, graph.op("Add", deviation, graph.scalar(constants["eps"])))
    decay = graph.op("Mul", rate, graph.scalar(constants["weight_decay"]))
    decayed = graph.op("Mul", weights, graph.op("Sub", graph.scalar(1.0), decay))
    new = graph.op("Sub", decayed, graph.op("Mul", direction, rate1))
    return {"weights": new, "moment1": moment1, "moment2": moment2, "steps": steps}


_UPDATES: dict[str, Callable[[Graph, Mapping[str, Any], str, str, str], dict[str, str]]] = {
    "sgd": _sgd,
    "adamw": _adamw,
}


def _mixed(graph: Graph, old: str, new: str, share: float) -> str:
    """Moving average share · old + (1 - share) · new."""
    return graph.op("Add", graph.op("Mul", old, graph.scalar(share)), graph.op("Mul", new, graph.scalar(1 - share)))


def _correction(graph: Graph, beta: float, steps: str, *, root: bool) -> str:
    """Bias correction 1 - beta^steps, or its square root; float32 from double, as the difference cancels."""
    power = graph.op("Pow", graph.array(np.array(beta)), graph.op("Cast", steps, to=TensorProto.DOUBLE))
    value = graph.op("Sub", graph.array(np.array(1.0)), power)
    return graph.op("Cast", graph.op("Sqrt", value) if root else value, to=TensorProto.FLOAT)
