"""Replacement of the BatchNorms of a model (`--batchnorm`): by fixed statistics, by those of a batch, by a GroupNorm.

Running statistics are neither weights nor constants: every batch of a training changes them, and no gradient does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import BatchNorm as Choice
from fedpara_edge.nn.groupnorm import group_norm_like

Fate = Literal["fixed", "batch", "group"]


class FixedNorm(nn.Module):
    """Normalization by fixed statistics, y = (x - μ) w / √(σ² + ε) + b, which is one product and one sum.

    Where neither w nor b is trained, `scale` and `shift` are all there is; else w and b are parameters of this module,
    the very objects of the BatchNorm.

    Args:
        batchnorm: BatchNorm with running statistics.
    """

    def __init__(self, batchnorm: _BatchNorm) -> None:
        super().__init__()
        assert batchnorm.running_mean is not None
        assert batchnorm.running_var is not None
        mean, variance = batchnorm.running_mean.double(), batchnorm.running_var.double()
        inverse = 1 / torch.sqrt(variance + batchnorm.eps)
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if _is_trained(batchnorm):
            self.weight, self.bias = batchnorm.weight, batchnorm.bias
            constants = {"mean": mean, "inverse": inverse}
        else:
            scale = inverse if batchnorm.weight is None else inverse * batchnorm.weight.detach()
            shift = -mean * scale if batchnorm.bias is None else batchnorm.bias.detach() - mean * scale
            constants = {"scale": scale, "shift": shift}
        for name, values in constants.items():
            self.register_buffer(name, values.to(batchnorm.running_mean.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [N, C, ...]."""
        scale, shift = self._affine()
        channels = [-1, *[1] * (x.dim() - 2)]
        return x * scale.reshape(channels) + shift.reshape(channels)

    def _affine(self) -> tuple[Tensor, Tensor]:
        if self.weight is None:
            return self.get_buffer("scale"), self.get_buffer("shift")
        scale = self.weight * self.get_buffer("inverse")
        shift = -self.get_buffer("mean") * scale
        return scale, shift if self.bias is None else self.bias + shift


class BatchStatisticsNorm(nn.Module):
    """Normalization by the statistics of the batch, in training and in evaluation, as BatchNorm without running ones.

    Args:
        batchnorm: BatchNorm whose weight and bias, the very objects, and ε it takes.
    """

    def __init__(self, batchnorm: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = batchnorm.weight, batchnorm.bias, batchnorm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [N, C, ...]."""
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def replace_batchnorms(model: nn.Module, choice: Choice) -> tuple[dict[nn.Module, nn.Module], list[str]]:
    """Replacements of the BatchNorms of a model, and what to tell the user about them.

    Two kinds of BatchNorm need no choice: one that is in evaluation mode with nothing trained is fixed, and one
    without running statistics normalizes every batch by its own.

    Args:
        model: Model, not modified.
        choice: Fate of the others.

    Raises:
        InputError: The choice is `refuse` and there is one, or one has a forward of its own.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    messages: list[str] = []
    fixed: list[_BatchNorm] = []
    for name, module in _batchnorms(model):
        fate = _fate(name, module, choice)
        if fate == "group":
            replacements[module] = norm = group_norm_like(module)
            groups = f"{norm.num_groups} group{'s' if norm.num_groups > 1 else ''}"
            kind = type(module).__name__
            messages.append(f"{name}: {kind} replaced by GroupNorm with {groups}, running statistics dropped")
        elif fate == "batch":
            replacements[module] = BatchStatisticsNorm(module)
            messages.append(f"{name}: {type(module).__name__} normalizes every batch by its own statistics")
        else:
            replacements[module] = FixedNorm(module)
            fixed.append(module)
    return replacements, [*messages, *_on_fixed(fixed)]


def _batchnorms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            if type(module).forward is not _BatchNorm.forward and not isinstance(module, nn.SyncBatchNorm):
                raise InputError(
                    f"module {name!r}: expected one of torch's BatchNorms, found {type(module).__name__} with a "
                    "forward of its own; replace it with a BatchNorm and what else it does"
                )
            yield name, module


def _fate(name: str, module: _BatchNorm, choice: Choice) -> Fate:
    if choice == "group":
        return "group"
    if module.running_mean is None:
        return "batch"
    if choice == "freeze" or not (module.training or _is_trained(module)):
        return "fixed"
    raise InputError(
        f"module {name!r}: {type(module).__name__} keeps running statistics, which no gradient trains; fix them "
        "as they are with batchnorm='freeze', or replace it with GroupNorm with batchnorm='group'"
    )


def _is_trained(module: _BatchNorm) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _on_fixed(norms: list[_BatchNorm]) -> list[str]:
    if not norms:
        return []
    trained = sum(map(_is_trained, norms))
    affine = {0: "neither statistics nor affine trained or sent", len(norms): "affine trained"}
    lines = [
        f"{len(norms)} BatchNorm{'s' * (len(norms) > 1)} with fixed statistics, "
        f"{affine.get(trained, f'affine trained in {trained} of them')}"
    ]
    if all(_is_fresh(norm) for norm in norms):
        lines.append("the fixed statistics are those of a new BatchNorm, 0 and 1; load pretrained ones")
    return lines


def _is_fresh(norm: _BatchNorm) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())
