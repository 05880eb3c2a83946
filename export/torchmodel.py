"""A bundle's model in torch, made again from its recipe, to be trained there.

It computes what the graphs of the bundle compute, from raw inputs to the losses of the heads. The tensors that training
changes start as the recipe draws them: load those of the bundle. What is frozen is as in the graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from export.build import factored_model
from export.exporter import deploy
from export.forward.ownloss import loaded
from export.forward.preprocess import Preprocessing
from export.reference import NO_CLASS, constants_of, losses_in_torch
from fedpara_edge.errors import WrongBundleError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.factors.roles import keep_personal
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.interface import Head
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.losses import CrossEntropy, find_head
from fedpara_edge.nn import layout_of
from fedpara_edge.nn.batchnorm import BatchStatisticsNorm, normalize_by_batches, running_statistics

Tensors = Mapping[str, torch.Tensor]


class TorchModel(nn.Module):
    """Model behind its preprocessing, with its losses; `copy.deepcopy` makes another one.

    Args:
        recipe: Recipe of the bundle.
        bundle: Bundle that was made from it.

    Raises:
        InputError: A part of the recipe does not fit.
        WrongBundleError: The bundle is of another recipe.
    """

    def __init__(self, recipe: Recipe, bundle: Bundle) -> None:
        super().__init__()
        made = factored_model(recipe)
        if keep_personal(layout_of(made.converted), recipe.personal) != bundle.manifest.layout:
            raise WrongBundleError(f"{bundle.path}: expected the tensors of its recipe, found others; make it again")
        self.deployed = deploy(made.converted, made.config)
        if not self.deployed.model.training:  # what is in evaluation mode inside a model in training stays so
            self.deployed.train()
        normalize_by_batches(self.deployed)
        self._in_training = [(module, module.training) for module in self.deployed.modules()]
        losses = [loaded(find_head(text)[1]) for text in made.config.loss]
        self.heads = [replace(head, loss=loss) for head, loss in zip(bundle.interface.heads, losses, strict=True)]
        self._constants: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> TorchModel:
        """Compute as in training, with what is in evaluation mode always left so; or as in evaluation."""
        self.training = mode
        for module, in_training in self._in_training:
            module.training = mode and in_training
        return self

    def place(self, device: torch.device) -> None:
        """Move the model to a device, its constants included: no later call copies anything there."""
        self.to(device)
        self.deployed.arguments = tuple(
            replace(each, preprocessing=_Placed(each.preprocessing, device)) for each in self.deployed.arguments
        )
        self._constants = constants_of(self.heads, torch.empty(0, device=device))

    def places(self, tensors: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """Parameters, running statistics and what updates hold, of some tensors."""
        model = self.deployed.model
        there = {**dict(model.named_buffers()), **dict(model.named_parameters()), **running_statistics(model)}
        return [there[tensor.name] for tensor in tensors]

    def forward(self, inputs: Tensors, labels: Tensors) -> tuple[torch.Tensor, Tensors]:
        """Losses [H], each times its weight, and float32 outputs [B, ...] by name, for raw inputs and labels."""
        outputs = {name: output.float() for name, output in self.deployed.by_name(*inputs.values()).items()}
        return losses_in_torch(self.heads, outputs, labels, self._constants), outputs

    def labels_that_never_count(self) -> dict[str, int] | None:
        """Labels of rows that fill up a batch and change nothing, by name.

        None if there are none: a loss is no cross entropy, or rows are normalized together.
        """
        apart = not any(isinstance(module, BatchStatisticsNorm) for module in self.modules())
        if not apart or running_statistics(self.deployed.model):
            return None
        found = {head.label.name: _uncounted(head) for head in self.heads}
        return None if None in found.values() else {name: label for name, label in found.items() if label is not None}


def _uncounted(head: Head) -> int | None:
    if not isinstance(head.loss, CrossEntropy):
        return None
    return NO_CLASS if head.loss.ignore_index is None else head.loss.ignore_index


class _Placed(Preprocessing):
    """Preprocessing with its constants on a device.

    Args:
        of: The preprocessing.
        device: The device.
    """

    def __init__(self, of: Preprocessing, device: torch.device) -> None:
        self.__dict__.update(copy.copy(of.__dict__))
        self._device = device
        self._kept: dict[tuple[float, ...], torch.Tensor | float] = {}

    def _constant(self, values: list[float], dtype: torch.dtype) -> torch.Tensor | float:
        key = tuple(values)
        if key not in self._kept:
            found = super()._constant(values, dtype)
            self._kept[key] = found.to(self._device) if isinstance(found, torch.Tensor) else found
        return self._kept[key]
