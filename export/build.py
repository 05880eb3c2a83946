"""`make_bundle`: from a recipe to a bundle, for the command line and for simulations alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.exporter import ExportOptions, export_bundle
from export.step.weight_update import optimizer_constants
from export.verify import Verification
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.nn import ZOO, ConversionReport, convert, load_model, load_pretrained
from fedpara_edge.storage.atomic import check_output


@dataclass(frozen=True, kw_only=True)
class BuiltBundle:
    """A bundle, what became of its layers, and by engine the relative errors against torch that were measured."""

    bundle: Bundle
    report: ConversionReport
    verification: dict[str, Verification]


def make_bundle(recipe: Recipe, folder: Path, *, overwrite: bool = False) -> BuiltBundle:
    """Make the model of a recipe, factor it, and write the bundle that trains it, verified against torch.

    Seeds torch's global generator, from which the initial weights come.

    Args:
        recipe: what to make.
        folder: the bundle to write; appears whole or not at all.
        overwrite: replace an existing bundle.

    Raises:
        InputError: a part of the recipe or the folder does not fit; an operator has no gradient.
        FedparaError: the verification failed, or the disk refuses the write.
    """
    check_output(folder, overwrite=overwrite, folder=True)
    zoo = ZOO.get(recipe.name)
    torch.manual_seed(recipe.seed)
    dense = load_model(recipe.name, classes=recipe.classes, input_shape=recipe.input_shape if zoo else None)
    shape = recipe.input_shape or (zoo.input_shape if zoo else None)
    if shape is None:
        raise InputError("input shape: expected --input-shape for your own model, such as 1,28,28, found none")
    dtype = recipe.input_dtype or (zoo.input_dtype if zoo else "float32")
    tokens = recipe.tokens
    if zoo and dtype == zoo.input_dtype == "int64" and tokens is None:
        tokens = recipe.classes or zoo.classes
    if recipe.pretrained is not None:
        load_pretrained(dense, recipe.pretrained)
    converted, report = convert(
        dense,
        kind=recipe.kind,
        gamma=recipe.gamma,
        form=recipe.form,
        tanh=recipe.tanh,
        include=recipe.include,
        exclude=(*recipe.exclude, *(zoo.dense_layers if zoo else ())),
        gammas=recipe.gammas,
        ranks=recipe.ranks,
        batchnorm=recipe.batchnorm,
        init=recipe.init,
        pretrained=recipe.pretrained is not None,
    )
    options = ExportOptions(
        name=recipe.name,
        input_shape=shape,
        input_dtype=dtype,
        tokens=tokens,
        mean=recipe.mean,
        std=recipe.std,
        loss=recipe.loss,
        optimizer=_optimizer(recipe),
        batch_size=recipe.batch_size,
        personal=recipe.personal,
        engines=recipe.engines,
        initial_codec=recipe.initial_codec,
        seed=recipe.seed,
    )
    bundle, verification = export_bundle(converted, folder, options, overwrite=overwrite)
    return BuiltBundle(bundle=bundle, report=report, verification=verification)


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    given = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    constants = {name: value for name, value in given.items() if value is not None}
    return optimizer_constants(recipe.optimizer, jacobian_correction=recipe.jacobian_correction, **constants)
