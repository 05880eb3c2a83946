"""Largest rate at which SGD is stable at the start, as what an export tells (`stable_rates`).

Close to where it is, the loss is a quadratic whose curvature is that of Gauss and Newton (`export.curvature`). Gradient
descent shrinks the error along every direction as long as its rate is below 2 / λ, with λ the largest eigenvalue. A
little above, the first steps overshoot: a loss that grows linearly, as cross-entropy, may bear that, as the steps may
lead to where the curvature is lower (Cohen et al. 2021, arXiv 2103.00065), and a squared error diverges at a few times
the rate. Momentum β moves the bound to 2 (1 + β) / λ where the gradient is that of all data, and not where it is a
batch's, so that the same is said with momentum as without (docs/measured.md).

Nothing is said where it would mislead: outside the `_USUAL` rates, as a model that hardly lets a signal through has
little curvature only until it has begun to learn, and one that normalizes nearly equal values has much of it in
directions that training leaves at once; of models that normalize over a batch, whose curvature depends on its size; and
of losses without curvature. A Huber loss counts as if all differences were small, which they become, and labels of a
loss of the user's own must be real where they are numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from export.batches import Batch, Batches
from export.curvature import largest_curvature
from export.forward.preprocess import Deployed
from export.reference import loss_in_torch
from fedpara_edge.formats.interface import Head
from fedpara_edge.losses import Huber, OwnLoss
from fedpara_edge.nn import GRU, LSTM
from fedpara_edge.nn.batchnorm import BatchStatisticsNorm, running_statistics

_USUAL = (1e-4, 0.3)
_ROWS, _LEAST_ROWS = 16, 4
_OPERATIONS, _PARAMETERS = 1e9, 10_000_000  # of a forward pass and of a model, beyond which it would take too long


@dataclass(frozen=True)
class StableRates:
    """Largest rates at which SGD is stable at the start.

    Args:
        factored: Rate of the factored model.
        dense: Rate of the dense model that it was made from; None where it is the same one, or not known.
        drawn: Whether inputs were drawn at random, for want of an example.
    """

    factored: float
    dense: float | None = None
    drawn: bool = False

    @property
    def falls_short(self) -> bool:
        """Whether the factored model is stable at less than half the dense one's rate only."""
        return self.dense is not None and self.factored < self.dense / 2

    def __str__(self) -> str:
        dense = "" if self.dense is None else f" (dense: {self.dense:.2g})"
        where = "random inputs" if self.drawn else "the example"
        return (
            f"SGD starts without overshooting up to a rate of {self.factored:.2g}{dense} on {where}; a higher one may "
            "train too"
        )


def stable_rates(
    factored: Deployed, dense: Deployed | None, heads: Sequence[Head], batches: Batches
) -> StableRates | None:
    """Rates of both models, or None where that of the factored one is not known or would mislead.

    Args:
        factored: Factored model.
        dense: Dense model with the same fixed parameters and normalizations; None if it is the same.
        heads: Outputs that are trained, with their labels and losses.
        batches: Source of batches.
    """
    for head in heads:
        if isinstance(head.loss, OwnLoss) and head.loss.labels == "numbers" and head.label.name not in batches.examples:
            return None
    rows = _affordable_rows(factored, batches)
    if rows < _LEAST_ROWS:
        return None
    batch = batches.draw(rows)
    own = _usual(stable_rate(factored, heads, batch))
    if own is None:
        return None
    drawn = any(spec.name not in batches.examples for spec in batches.inputs)
    return StableRates(own, None if dense is None else _usual(stable_rate(dense, heads, batch)), drawn)


def _usual(rate: float | None) -> float | None:
    return rate if rate is not None and _USUAL[0] <= rate <= _USUAL[1] else None


def stable_rate(model: Deployed, heads: Sequence[Head], batch: Batch) -> float | None:
    """Rate 2 / λ of a model on a batch, whatever it is; None where λ is zero, not found, or another with more rows.

    Args:
        model: Model; not modified.
        heads: Outputs that are trained, with their labels and losses.
        batch: Raw inputs and labels.
    """
    over_batches = running_statistics(model) or any(isinstance(each, BatchStatisticsNorm) for each in model.modules())
    if over_batches or sum(each.numel() for each in model.parameters() if each.requires_grad) > _PARAMETERS:
        return None
    inputs, labels = (
        {name: torch.from_numpy(array) for name, array in arrays.items()} for arrays in (batch.inputs, batch.labels)
    )
    model = copy.deepcopy(model).eval()  # without dropout
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        outputs = model.by_name(*inputs.values())
        trained = {name: output for name, output in outputs.items() if output.requires_grad}
        labels |= {
            head.label.name: outputs[head.output.name].detach() for head in heads if isinstance(head.loss, Huber)
        }

        def loss(varied: Sequence[torch.Tensor]) -> torch.Tensor:
            return loss_in_torch(heads, outputs | dict(zip(trained, varied, strict=True)), labels)

        try:
            found = largest_curvature([*trained.values()], loss, parameters) if trained else None
        except RuntimeError:  # torch's, of an operator that it can differentiate once only
            return None
    return None if found is None else 2 / found


def _affordable_rows(model: Deployed, batches: Batches) -> int:
    """Rows of a batch on which a forward pass takes no more than `_OPERATIONS`; few with recurrent layers."""
    if any(isinstance(module, _RECURRENT) for module in model.modules()):  # whose operations are not counted
        return _LEAST_ROWS
    rows = 2
    inputs = [torch.from_numpy(array) for array in batches.draw(rows).inputs.values()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval().by_name(*inputs)
    return int(min(_ROWS, _OPERATIONS * rows // max(counter.get_total_flops(), 1)))


_RECURRENT = (torch.nn.RNNBase, LSTM, GRU)
