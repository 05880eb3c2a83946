"""Weight normalization in its two spellings in torch."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import remove_weight_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.weight_norm import WeightNorm


def copied(model: nn.Module) -> nn.Module:
    """Deep copy of a model, with `torch.nn.utils.parametrizations.weight_norm` for `torch.nn.utils.weight_norm`.

    The latter leaves what it computed at the module, which neither `copy.deepcopy` nor an export takes.
    """
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, torch.Tensor) and not value.is_leaf]
    result = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    for module in [*result.modules()]:
        for hook in [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]:
            _modernize(module, hook)
    return result


def _modernize(module: nn.Module, hook: WeightNorm) -> None:
    parts = [module.get_parameter(f"{hook.name}{suffix}") for suffix in ("_g", "_v")]
    remove_weight_norm(module, hook.name)
    weight_norm(module, hook.name, hook.dim)
    parametrization = module.get_submodule(f"parametrizations.{hook.name}")
    for name, part in zip(("original0", "original1"), parts, strict=True):
        setattr(parametrization, name, part)
