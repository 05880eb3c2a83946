"""Lazy modules, whose weights take their shape from the first example that they meet."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from export.complaints import gist
from export.exporter import deploy_in_place, inputs_of
from fedpara_edge.errors import InputError
from fedpara_edge.formats.recipe import Recipe


def shape_lazily(model: nn.Module, config: Recipe) -> None:
    """Give the weights of a model their shapes, if it has lazy modules, by an example of zeros.

    Args:
        model: Model, whose modes and running statistics stay.
        config: Recipe with its inputs.

    Raises:
        InputError: It does not take them.
    """
    if not any(map(is_lazy, itertools.chain(model.parameters(), model.buffers()))):
        return
    modes = [(module, module.training) for module in model.modules()]
    zeros = [torch.zeros(1, *each.shape, dtype=getattr(torch, each.dtype)) for each in inputs_of(config).values()]
    try:
        with torch.no_grad():
            deploy_in_place(model, config).eval().by_name(*zeros)
    except InputError:
        raise
    except Exception as error:  # whatever goes wrong here lies in the user's model
        taken = " and ".join(f"{x.dtype} {list(x.shape)}" for x in zeros)
        raise InputError(f"model: expected to take {taken}, found {gist(error)}; check --input-shape") from error
    for module, mode in modes:
        module.training = mode
