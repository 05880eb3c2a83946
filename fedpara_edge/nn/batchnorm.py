"""Replacement of the BatchNorms of a model (`--batchnorm`), each by what trains on a device as the user chose.

Running statistics are neither weights nor constants: every batch of a training changes them, and no gradient does. They
stay as they are (`freeze`), travel and are averaged (`train`), or stay on the device together with the affine map
(`local`: FedBN, Li et al. 2021, arXiv 2102.07623).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpara_edge.errors import InputError, counted
from fedpara_edge.factors.factorization import BatchNorm as Choice
from fedpara_edge.nn.groupnorm import group_norm_like

Fate = Literal["fixed", "batch", "running", "group"]


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


class RunningNorm(nn.Module):
    """BatchNorm whose running statistics are state of the training, as torch has it.

    In training, x is normalized by the mean and the variance of the batch, and μ ← (1 - m) μ + m mean,
    σ² ← (1 - m) σ² + m variance · n / (n - 1), with n values of a channel in the batch; in evaluation, by μ and σ².

    Args:
        batchnorm: BatchNorm with running statistics, whose parameters and buffers, the very objects, it takes.
        local: Whether all of it stays on the device.
    """

    def __init__(self, batchnorm: _BatchNorm, *, local: bool) -> None:
        super().__init__()
        self.weight, self.bias = batchnorm.weight, batchnorm.bias
        self.register_buffer("running_mean", batchnorm.running_mean)
        self.register_buffer("running_var", batchnorm.running_var)
        self.eps, self.local = batchnorm.eps, local
        self.momentum = batchnorm.momentum or 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [N, C, ...]."""
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)


def normalize_by_batches(model: nn.Module) -> None:
    """Put the BatchNorms with running statistics in training mode, in place, and leave dropout as it is."""
    for module in model.modules():
        if isinstance(module, RunningNorm):
            module.train()


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics that a training changes, by name."""
    return {
        f"{name}.{part}" if name else part: buffer
        for name, module in model.named_modules()
        if isinstance(module, RunningNorm)
        for part, buffer in module.named_buffers()
    }


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
    running: list[_BatchNorm] = []
    for name, module in _batchnorms(model):
        fate = _fate(name, module, choice)
        if fate == "group":
            replacements[module] = norm = group_norm_like(module)
            groups = counted(norm.num_groups, "group")
            kind = type(module).__name__
            messages.append(f"{name}: {kind} replaced by GroupNorm with {groups}, running statistics dropped")
        elif fate == "batch":
            replacements[module] = BatchStatisticsNorm(module)
            messages.append(f"{name}: {type(module).__name__} normalizes every batch by its own statistics")
        elif fate == "running":
            replacements[module] = RunningNorm(module, local=choice == "local")
            running.append(module)
        else:
            replacements[module] = FixedNorm(module)
            fixed.append(module)
    return replacements, [*messages, *_on_fixed(fixed), *_on_running(running, choice)]


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
    if choice != "refuse":
        if module.momentum is None:
            raise InputError(
                f"module {name!r}: expected a momentum of the running statistics, found None, which averages all "
                "batches alike; set one, such as 0.1"
            )
        return "running"
    raise InputError(
        f"module {name!r}: {type(module).__name__} keeps running statistics, which no gradient trains; choose "
        "freeze to fix pretrained ones, train to average them, local to keep the BatchNorm on the device, or group "
        "for a GroupNorm",
        key="batchnorm",
    )


def _is_trained(module: _BatchNorm) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _on_fixed(norms: list[_BatchNorm]) -> list[str]:
    if not norms:
        return []
    trained = sum(map(_is_trained, norms))
    affine = {0: "neither statistics nor affine trained or sent", len(norms): "affine trained"}
    lines = [
        f"{counted(len(norms), 'BatchNorm')} with fixed statistics, "
        f"{affine.get(trained, f'affine trained in {trained} of them')}"
    ]
    if all(_is_fresh(norm) for norm in norms):
        lines.append("the fixed statistics are those of a new BatchNorm, 0 and 1; load pretrained ones")
    return lines


def _on_running(norms: list[_BatchNorm], choice: Choice) -> list[str]:
    if not norms:
        return []
    size = 2 * sum(norm.num_features for norm in norms)
    fate = "that stay on the device" if choice == "local" else f"whose {size:,} running statistics are averaged as well"
    return [f"{counted(len(norms), 'BatchNorm')} {fate}"]


def _is_fresh(norm: _BatchNorm) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())
