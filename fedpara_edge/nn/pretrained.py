"""Pretrained weights of a dense model, loaded before its conversion."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedpara_edge.errors import InputError


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Load a `state_dict` into a model, in place.

    Args:
        model: Dense model, before its conversion.
        path: File in the format `.safetensors` or of `torch.save`, from which only tensors are read, never code.

    Raises:
        InputError: The file is missing or damaged, or its names or shapes are not the model's.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a file with a state_dict, found none; check the path")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: expected a state_dict in .safetensors or of torch.save, found a damaged file or a whole pickled "
            "model; save model.state_dict()"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a state_dict, found {type(state).__name__}; save model.state_dict()")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            there = f"shape {found[name]}" if name in found else f"no such tensor among {', '.join(list(state)[:5])} …"
            wanted = f"shape {expected[name]}" if name in expected else "no tensor of that name"
            raise InputError(
                f"{path}: tensor {name!r}: expected {wanted}, found {there}; use the state_dict of this model"
            )
    model.load_state_dict(state)
