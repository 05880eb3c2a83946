"""Parameters of a model that stay as they are (`--freeze`): not trained, not sent, part of the graphs.

No gradient is computed for them, nor for what lies below the lowest trained parameter, whose activations are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpara_edge.errors import InputError
from fedpara_edge.factors.roles import is_named


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze some of a model's parameters, in place.

    A BatchNorm with nothing left to train is put in evaluation mode: its statistics stay as well.

    Args:
        model: Model.
        patterns: Patterns of parameters, or of modules that hold them.

    Raises:
        InputError: A pattern matches no parameter, or no parameter would be trained any more.

    >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    >>> freeze(model, ["0"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['1.weight', '1.bias']
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    tensors = {name: _tensors(name, norm) for name, norm in norms.items()}
    for pattern in patterns:
        if not any(is_named(name, pattern) for name in (*parameters, *chain.from_iterable(tensors.values()))):
            raise InputError(
                f"expected patterns of parameters or modules of the model, found {pattern!r}, which matches none",
                key="freeze",
            )
    for name, parameter in parameters.items():
        if any(is_named(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    for name, norm in norms.items():
        matched = any(is_named(tensor, pattern) for tensor in tensors[name] for pattern in patterns)
        if matched and not any(parameter.requires_grad for parameter in norm.parameters()):
            norm.eval()
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError("expected a parameter left to train, found all frozen; freeze fewer of them", key="freeze")


def _tensors(name: str, norm: _BatchNorm) -> list[str]:
    """Names by which patterns know a BatchNorm, which may have running statistics only."""
    parts = [part for part, _ in norm.named_parameters()] or ["running_mean"]
    return [f"{name}.{part}" if name else part for part in parts]
