"""Verification of the exporter's own work: the written files must train what the PyTorch model trains.

The reference is torch in double precision, so that what is measured is the files' own error. `trials` finds out what
they compute, engine by engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from export.forward.graph import ForwardGraph
from export.forward.preprocess import Deployed
from export.step.jacobian import corrections_in_torch, recording_weights
from export.step.weight_update import CORRECTION
from export.trials import STEP, Batch, Results, Trial, flattened
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.formats.interface import Head

TOLERANCE = 1e-5
_NEGLIGIBLE = 1e-3
_ROUNDING, _PERTURBATIONS, _LIKENESS = 1e-6, 8, 10.0


@dataclass(frozen=True)
class Verification:
    """Relative errors of an engine's files against torch in double precision; all at most `TOLERANCE`.

    `gradient` and `step` are the largest over the parameters, in the Frobenius norm; a gradient that is (nearly) zero
    is compared on the scale of 1e-3 times the norm of all gradients together, where float32 has its rounding. `step` is
    None where the files don't contain the optimizer.
    """

    loss: float
    gradient: float
    outputs: float
    step: float | None

    @property
    def worst(self) -> float:
        """Largest of the errors."""
        return max(self.loss, self.gradient, self.outputs, self.step or 0.0)


def check_parameters(graph: ForwardGraph, tensors: Sequence[TensorSpec]) -> None:
    """Check that every trained tensor is an initializer of the graph under its name and shape, and used there.

    Raises:
        InputError: A tensor is not: the model does not use it, or the exporter folded it into something else.
    """
    initializers = {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}
    used = {name for node in graph.model.graph.node for name in node.input}
    for tensor in tensors:
        found = initializers.get(tensor.name)
        if found != tensor.shape or tensor.name not in used:
            raise InputError(
                f"parameter {tensor.name!r}: expected {list(tensor.shape)} in the graph and in use, found "
                f"{'it unused or folded away' if found in (None, tensor.shape) else list(found or ())}; "
                "remove it from the model or set requires_grad=False (nothing was written)"
            )


def verify(
    trials: Mapping[str, Trial],
    model: Deployed,
    *,
    heads: Sequence[Head],
    optimizer: Mapping[str, Any],
    batches: Iterable[Batch],
) -> dict[str, Verification]:
    """Compare what the files of each engine compute with torch: loss, gradients, outputs and optimizer step.

    A ReLU whose input is within rounding of zero, or a tie in a max pooling, may fall on the other side in double
    precision, and a deep network may amplify rounding beyond the tolerance. Such a batch is skipped in favor of the
    next, but only if torch's own gradient in double precision moves nearly as much (within `_LIKENESS`) when the
    weights are changed by rounding errors: a wrong graph differs where the gradient stands still, and is refused at
    once.

    Args:
        trials: Functions that run the files on a batch, by engine.
        model: PyTorch model that the files stand for, with the same parameters.
        heads: Outputs that the files train, with their labels and losses.
        optimizer: Constants of the optimizer.
        batches: Raw inputs and labels [B, ...] by name, to try one after the other.

    Returns:
        Errors by engine, on the first batch on which all of them are within `TOLERANCE`.

    Raises:
        InputError: A runtime does not run the files.
        FedparaError: A result differs and rounding does not explain it, or differs on all batches.
    """
    verified: dict[str, Verification] = {}
    for number, batch in enumerate(batches, 1):
        expected = _reference(model, batch, heads, optimizer)
        excesses = []
        for engine in trials.keys() - verified.keys():
            verification, excess = _compare(_try(engine, trials[engine], batch), expected, optimizer)
            if not excess:
                verified[engine] = verification
            else:
                excesses.append((verification.worst, f"{engine}: {excess}, on batch {number}"))
        if not excesses:
            return {engine: verified[engine] for engine in trials}
        error, excess = max(excesses)
        moves = _moves(model, batch, heads, optimizer, expected)
        if all(error > _LIKENESS * move for move in moves):
            break
    raise FedparaError(f"{excess}; nothing was written: please report this model")


def _try(engine: str, trial: Trial, batch: Batch) -> Results:
    try:
        return trial(batch)
    except (FedparaError, OSError):
        raise
    except Exception as error:  # the exceptions of the runtimes have no common base
        raise InputError(
            f"model: expected one that {engine} runs on any batch, found {' '.join(str(error).split())[-300:]}; "
            "replace the module it names, or try another --engine (nothing was written)"
        ) from error


def _moves(
    model: Deployed, batch: Batch, heads: Sequence[Head], optimizer: Mapping[str, Any], expected: _Reference
) -> Iterator[float]:
    """Largest change of the gradient of any parameter for each of some changes of the weights by `_ROUNDING`."""
    floor = _NEGLIGIBLE * _norm(expected.gradients)
    for seed in range(_PERTURBATIONS):
        moved = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(1 + _ROUNDING * torch.randn(parameter.shape, generator=generator))
        gradients = _reference(moved, batch, heads, optimizer).gradients
        yield max(_relative(gradients[name], gradient, floor=floor) for name, gradient in expected.gradients.items())


@dataclass(frozen=True)
class _Reference:
    loss: float
    outputs: NDArray[Any]
    gradients: dict[str, NDArray[Any]]
    weights: dict[str, NDArray[Any]]


def _compare(found: Results, expected: _Reference, optimizer: Mapping[str, Any]) -> tuple[Verification, str]:
    """Errors, and a description of the first that exceeds the tolerance, or ""."""
    floor = _NEGLIGIBLE * _norm(expected.gradients)
    gradients = {
        name: _relative(found.gradients[name], gradient, floor=floor) for name, gradient in expected.gradients.items()
    }
    steps = {
        name: _relative(weight, _stepped(expected.weights[name], found.gradients[name], optimizer))
        for name, weight in (found.stepped or {}).items()
    }
    worst_gradient, worst_step = (
        max(gradients, key=gradients.__getitem__),
        max(steps, key=steps.__getitem__, default=""),
    )
    verification = Verification(
        loss=_relative(np.array(found.loss), np.array(expected.loss)),
        gradient=gradients[worst_gradient],
        outputs=_relative(found.outputs, expected.outputs),
        step=steps.get(worst_step),
    )
    for what, error in (
        ("loss", verification.loss),
        ("outputs", verification.outputs),
        (f"gradient of {worst_gradient!r}", verification.gradient),
        (f"{optimizer['name']} step of {worst_step!r}", verification.step),
    ):
        if error is not None and not error <= TOLERANCE:
            return verification, f"{what}: expected torch's result within {TOLERANCE:g} relative, found {error:.2g}"
    return verification, ""


def _reference(model: Deployed, batch: Batch, heads: Sequence[Head], optimizer: Mapping[str, Any]) -> _Reference:
    double = copy.deepcopy(model).double().eval()
    double.dtype = torch.float64
    with recording_weights(double) as weights:
        outputs = double.by_name(*batch[0].values())
    value = loss_in_torch(heads, outputs, batch[1])
    names = {name: parameter for name, parameter in double.model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(value, list(names.values()), retain_graph=True)
    corrections: dict[torch.nn.Parameter, torch.Tensor] = {}
    if CORRECTION in optimizer:
        corrections = corrections_in_torch(value, weights, strength=optimizer[CORRECTION], learning_rate=STEP)
    return _Reference(
        loss=value.item(),
        outputs=flattened(output.detach().numpy() for output in outputs.values()),
        gradients={
            name: (gradient + corrections.get(parameter, 0)).numpy()
            for (name, parameter), gradient in zip(names.items(), gradients, strict=True)
        },
        weights={name: parameter.detach().numpy() for name, parameter in names.items()},
    )


def loss_in_torch(
    heads: Sequence[Head], outputs: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Loss [] of outputs and labels by name, as torch computes it, in the dtype of the outputs."""
    (head,) = heads
    output, y = outputs[head.output.name], labels[head.label.name]
    return _LOSS_FUNCTIONS[head.loss.name](output, y.to(output.dtype) if y.is_floating_point() else y)


_LOSS_FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


def _stepped(weight: NDArray[Any], gradient: NDArray[Any], optimizer: Mapping[str, Any]) -> NDArray[Any]:
    """Weight after one step of torch's optimizer from the files' own gradient, in double precision.

    Torch's gradient would not do, because AdamW divides a gradient by its size: near zero, that amplifies a rounding
    error.
    """
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    parameter.grad = torch.from_numpy(gradient.astype(np.float64))
    constants = {key: value for key, value in optimizer.items() if key not in ("name", CORRECTION)}
    _OPTIMIZERS[optimizer["name"]]([parameter], lr=STEP, **constants).step()
    return parameter.detach().numpy()


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def _norm(tensors: Mapping[str, NDArray[Any]]) -> float:
    return float(np.sqrt(sum(np.sum(tensor**2) for tensor in tensors.values())))


def _relative(found: NDArray[Any], expected: NDArray[Any], *, floor: float = 0.0) -> float:
    difference = float(np.linalg.norm(np.ravel(found).astype(np.float64) - np.ravel(expected)))
    return difference / max(float(np.linalg.norm(expected)), floor, 1e-30)
