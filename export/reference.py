"""The model in torch, as the reference of a verification: exactly, in float32, and with rounding drawn at random.

How far float32 may be off is measured rather than assumed. `Reference.rounded` computes in double precision and rounds
the result of every operator, forward and backward, at random: each entry by up to a unit of its own size, and all
entries of a result in one direction by another (the random directions of CESTAC). The first makes what float32 makes of
most values; the second is what remains of a sum whose terms cancel, as the gradient of a bias before a normalization:
unit · Σ|terms|, while the sum itself is zero. Sources: Parker, Monte Carlo Arithmetic (1997); Vignes, A stochastic
arithmetic for reliable scientific computation (1993).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from export.batches import Batch, joined
from export.complaints import gist
from export.doubling import doubling
from export.forward.ownloss import LoadedLoss
from export.forward.preprocess import Deployed
from export.step.draws import Draws
from export.step.frobenius import decays_in_torch
from export.step.jacobian import corrections_in_torch, recording_weights
from export.step.weight_update import CORRECTION, DECAY
from export.trials import SEED, STEP, Results, Tensors
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import Head
from fedpara_edge.losses import BinaryCrossEntropy, CrossEntropy, Huber, Loss, MeanAbsoluteError, MeanSquaredError
from fedpara_edge.nn import GRU, LSTM
from fedpara_edge.nn.batchnorm import normalize_by_batches, running_statistics

UNIT = 2.0**-24
"""Largest relative error of rounding to float32."""


class Reference:
    """The model in torch.

    Args:
        model: Model that the files stand for, with the same parameters.
        outputs: Shapes of the outputs of one example, by name.
        heads: Outputs that the files train, with their labels and losses.
        optimizer: Constants of the optimizer.
        drawing: Whether the model draws at random in training, besides in Dropouts.

    Attributes:
        weights: Trained weights by tensor, in double precision.
    """

    def __init__(
        self,
        model: Deployed,
        *,
        outputs: Mapping[str, tuple[int, ...]],
        heads: Sequence[Head],
        optimizer: Mapping[str, Any],
        drawing: bool = False,
    ) -> None:
        self._single = copy.deepcopy(model).eval()
        self._double = copy.deepcopy(self._single).double()
        self._double.dtype = torch.float64
        self._shapes, self._heads, self._optimizer, self._drawing = outputs, heads, optimizer, drawing
        self.weights: Tensors = {name: parameter.detach().numpy() for name, parameter in _trained(self._double)}

    def check(self, batch: Batch) -> None:
        """Check that torch has a gradient for every trained tensor.

        Raises:
            InputError: It has none for one, or can't compute any.
        """
        try:
            self.single(batch, evaluating=False)
        except InputError:
            raise
        except Exception as error:  # whatever goes wrong here lies in the user's model
            raise InputError(
                f"model: expected one that torch can differentiate, found {gist(error)} (nothing was written)"
            ) from error

    def exact(self, batch: Batch) -> Results:
        """Results in double precision.

        Raises:
            InputError: The model does not run in it.
        """
        try:
            with doubling():
                return self._run(self._double, batch)
        except InputError:
            raise
        except Exception as error:  # whatever goes wrong here lies in the user's model
            raise InputError(
                f"model: expected one that computes in double precision too, to verify it by, found {gist(error)}; "
                "make tensors in forward of the dtype of the input or the weights"
            ) from error

    def single(self, batch: Batch, *, evaluating: bool = True) -> Results:
        """Results in float32, without outputs if not `evaluating`."""
        return self._run(self._single, batch, evaluating)

    def rounded(self, batch: Batch, *, seed: int, unit: float = UNIT, evaluating: bool = True) -> Results:
        """Results in double precision with each operator's rounded at random, without outputs if not `evaluating`."""
        with doubling(), _Rounding(seed, unit):
            return self._run(self._double, batch, evaluating)

    def _run(self, model: Deployed, batch: Batch, evaluating: bool = True) -> Results:
        """Results on a batch.

        A single row, which `squeeze()` mistakes for no batch, runs as two equal ones where torch itself would fail or
        lose the row: the means of loss and gradient are the same, and running statistics, which are not, are left out.
        """
        if batch.rows > 1:
            return self._results(model, batch, evaluating)
        try:
            return self._results(model, batch, evaluating)
        except (RuntimeError, ValueError, IndexError, InputError):  # of torch, which has no common base for them
            found = self._results(model, joined([batch, batch]), evaluating, twins=True)
        return replace(found, outputs={name: output[:1] for name, output in found.outputs.items()}, statistics={})

    def _results(self, model: Deployed, batch: Batch, evaluating: bool, *, twins: bool = False) -> Results:
        inputs, labels = (
            {name: torch.from_numpy(array) for name, array in arrays.items()} for arrays in (batch.inputs, batch.labels)
        )
        evaluated = _evaluated(model, inputs, drawing=self._drawing) if evaluating else {}
        drawing = _drawing(model, twins=twins) if self._drawing else nullcontext()
        with (
            torch.enable_grad(),
            _normalizing_by_batches(model) as statistics,
            recording_weights(model) as weights,
            drawing,
        ):
            outputs = model.by_name(*inputs.values())
            for name, shape in self._shapes.items():
                if tuple(outputs[name].shape) != (batch.rows, *shape):
                    raise InputError(
                        f"model: expected {name!r} {[batch.rows, *shape]} for {batch.rows} rows, "
                        f"found {list(outputs[name].shape)}; keep the batch first"
                    )
            value = loss_in_torch(self._heads, outputs, labels)
            trained = _trained(model)
            corrects = CORRECTION in self._optimizer
            gradients = _gradients(value, trained, retain_graph=corrects)
            kept = {name: statistic.numpy().copy() for name, statistic in statistics.items()}
        corrections: dict[torch.Tensor, torch.Tensor] = {}
        if corrects:
            corrections = corrections_in_torch(value, weights, strength=self._optimizer[CORRECTION], learning_rate=STEP)
        elif DECAY in self._optimizer:
            corrections = decays_in_torch(model, self._optimizer[DECAY])
        return Results(
            value.item(),
            {name: output.detach().numpy() for name, output in (outputs if evaluated is None else evaluated).items()},
            {
                name: (gradient + corrections[parameter] if parameter in corrections else gradient).numpy()
                for (name, parameter), gradient in zip(trained, gradients, strict=True)
            },
            kept,
        )


def _gradients(
    value: torch.Tensor, trained: Sequence[tuple[str, torch.nn.Parameter]], *, retain_graph: bool
) -> tuple[torch.Tensor, ...]:
    """Gradients of a loss by trained tensors.

    Raises:
        InputError: The loss depends on one of them in no way that has a gradient.
    """
    parameters = [parameter for _, parameter in trained]
    found: Sequence[torch.Tensor | None] = [None] * len(parameters)
    if value.requires_grad:
        found = torch.autograd.grad(value, parameters, retain_graph=retain_graph, allow_unused=True)
    gradients = tuple(gradient for gradient in found if gradient is not None)
    if len(gradients) < len(trained):
        name = next(name for (name, _), gradient in zip(trained, found, strict=True) if gradient is None)
        raise InputError(
            f"parameter {name!r}: expected a gradient of the loss in torch, found none, as with .detach() or argmax; "
            f"leave it as it is, --freeze {name.rpartition('.')[0] or name!r}, or mend the model (nothing was written)"
        )
    return gradients


def _evaluated(
    model: Deployed, inputs: Mapping[str, torch.Tensor], *, drawing: bool
) -> Mapping[str, torch.Tensor] | None:
    """Outputs in evaluation; None if training gives the same, as it does without running statistics and draws."""
    if not drawing and not running_statistics(model.model):
        return None
    with torch.no_grad():
        return model.by_name(*inputs.values())


@contextmanager
def _drawing(model: Deployed, *, twins: bool) -> Iterator[None]:
    """Context in which a model draws as its training step does with the seed of a trial, and drops nothing."""
    for module in model.modules():
        module.training = not isinstance(module, _DROPPING) and (
            module.training or not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        )
    try:
        with Draws(SEED, twins=twins):
            yield
    finally:
        model.eval()


_DROPPING = (torch.nn.Dropout, torch.nn.MultiheadAttention, torch.nn.RNNBase, LSTM, GRU)
"""Modules that drop in training, and do nothing else then."""


@contextmanager
def _normalizing_by_batches(model: Deployed) -> Iterator[dict[str, torch.Tensor]]:
    """Context in which BatchNorms are in training mode, and after which running statistics are as they were."""
    statistics = running_statistics(model.model)
    arrays = {name: statistic.numpy() for name, statistic in statistics.items()}  # which `_Rounding` leaves alone
    before = {name: array.copy() for name, array in arrays.items()}
    normalize_by_batches(model)
    try:
        yield statistics
    finally:
        model.eval()
        for name, array in arrays.items():
            array[...] = before[name]


def loss_in_torch(
    heads: Sequence[Head], outputs: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Loss [] of outputs and labels by name, as torch computes it, in the dtype of the outputs."""
    return losses_in_torch(heads, outputs, labels, constants_of(heads, next(iter(outputs.values())))).sum()


def constants_of(heads: Sequence[Head], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Constants of the losses of heads, of the dtype and on the device of a tensor, by output; without equal weights.

    They are the weights of classes [C], or the weight of yes [].
    """
    found = {}
    for head in heads:
        if isinstance(head.loss, CrossEntropy) and head.loss.class_weights:
            found[head.output.name] = like.new_tensor(head.loss.class_weights)
        elif isinstance(head.loss, BinaryCrossEntropy) and head.loss.pos_weight != 1:
            found[head.output.name] = like.new_tensor(head.loss.pos_weight)
    return found


def losses_in_torch(
    heads: Sequence[Head],
    outputs: Mapping[str, torch.Tensor],
    labels: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Losses [H] of the heads, each times its weight.

    Args:
        heads: Heads.
        outputs: Outputs [B, ...] by name.
        labels: Labels [B, ...] by name; a class `NO_CLASS` never counts.
        constants: Result of `constants_of` for the heads.
    """
    values = []
    for head in heads:
        output, y = outputs[head.output.name], labels[head.label.name]
        y = y.to(output.dtype) if y.is_floating_point() else y
        values.append(head.loss.weight * _in_torch(head.loss, output, y, constants.get(head.output.name)))
    return torch.stack(values)


NO_CLASS = -100
"""Label that does not count unless a loss has another: torch's own default."""


def _in_torch(loss: Loss, output: torch.Tensor, y: torch.Tensor, constant: torch.Tensor | None) -> torch.Tensor:
    match loss:
        case CrossEntropy():
            return _cross_entropy(loss, output, y, constant)
        case MeanSquaredError():
            return F.mse_loss(output, y)
        case MeanAbsoluteError():
            return F.l1_loss(output, y)
        case Huber():
            return F.huber_loss(output, y, delta=loss.delta)
        case BinaryCrossEntropy():
            return F.binary_cross_entropy_with_logits(output, y, pos_weight=constant)
        case LoadedLoss():
            found: torch.Tensor = copy.deepcopy(loss.module).to(output)(output, y)
            return found
    raise AssertionError(loss)


def _cross_entropy(
    loss: CrossEntropy, output: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Torch's mean, but 0 where no label counts."""
    ignored = NO_CLASS if loss.ignore_index is None else loss.ignore_index
    total = F.cross_entropy(
        output, y, weights, ignore_index=ignored, label_smoothing=loss.label_smoothing, reduction="sum"
    )
    counting = y != ignored
    count = (counting if weights is None else weights[y * counting] * counting).sum()
    return total / (count + (count == 0))


def _trained(model: Deployed) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.model.named_parameters() if parameter.requires_grad]


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounding of the results of operators: by up to `unit` of each entry, and by `unit` of all in one direction."""

    def __init__(self, seed: int, unit: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._random, self._unit = random.Random(seed), unit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        found = func(*args, **(kwargs or {}))
        if not any(entry.alias_info is not None for entry in func._schema.returns):
            for value in found if isinstance(found, tuple | list) else (found,):
                if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.numel():
                    self._round(value)
        return found

    def _round(self, value: torch.Tensor) -> None:
        direction = self._unit if self._random.random() < 0.5 else -self._unit
        magnitude = value.abs()
        entries = value.view(-1) if value.is_contiguous() else value.reshape(-1)
        noise = _noise()[self._random.randrange(_NOISE // 2) :][: _NOISE // 2]
        for piece in entries.split(_NOISE // 2):  # type: ignore[no-untyped-call]
            piece.addcmul_(piece, noise[: len(piece)], value=self._unit)
        if not value.is_contiguous():
            value.copy_(entries.view(value.shape))
        value.add_(magnitude, alpha=direction)


@cache
def _noise() -> torch.Tensor:
    """Noise in [-1, 1), of which each result takes a part: drawn anew for each, it would take most of the time."""
    return 2 * torch.rand(_NOISE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1


_NOISE = 1 << 21
