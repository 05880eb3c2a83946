"""Bundles made from recipes (`make_bundle`), for the command line and for simulations alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from export.batches import Batches
from export.example import read_example
from export.exporter import deploy, export_bundle, quietly
from export.fidelity import Fidelity, compare_fit
from export.forward.ownloss import loaded
from export.lazy import shape_lazily
from export.stability import StableRates, stable_rates
from export.verify import Verification
from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import BatchNorm, Factorization
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.losses import find_head
from fedpara_edge.nn import ZOO, ConversionReport, Pretrained, convert, load_model, load_pretrained
from fedpara_edge.storage.atomic import check_output


@dataclass(frozen=True, kw_only=True)
class BuiltBundle:
    """Bundle that was made, and what was measured and found on the way.

    Args:
        bundle: The bundle.
        report: Report on its layers.
        verification: Errors against torch, by engine.
        left_out: Reasons why engines that were not named can't train the model, by engine.
        pretrained: Report on the pretrained weights; None without.
        fidelity: Distance of the fitted model from the dense one on the recipe's example; None without either.
        rates: Rates that SGD is stable at in the beginning; None where they are not known.
    """

    bundle: Bundle
    report: ConversionReport
    verification: dict[str, Verification]
    left_out: dict[str, str]
    pretrained: Pretrained | None
    fidelity: Fidelity | None
    rates: StableRates | None


@dataclass(frozen=True, kw_only=True)
class FactoredModel:
    """Model of a recipe.

    Args:
        dense: Model as its factory made it, with pretrained weights if there are any.
        converted: Model that is exported.
        config: Recipe with the inputs of the model.
        batchnorm: Choice that was made for its BatchNorms.
        report: Report on its layers.
        pretrained: Report on the pretrained weights; None without.
        examples: Rows of the recipe's example, by name; none without.
    """

    dense: nn.Module
    converted: nn.Module
    config: Recipe
    batchnorm: BatchNorm
    report: ConversionReport
    pretrained: Pretrained | None
    examples: Mapping[str, NDArray[Any]]


def factored_model(recipe: Recipe) -> FactoredModel:
    """Make the model of a recipe, and factor it.

    Seeds torch's global generator, from which the initial weights come.

    Raises:
        InputError: A part of the recipe does not fit.
    """
    recipe, examples = read_example(recipe)
    zoo = ZOO.get(recipe.name)
    torch.manual_seed(recipe.seed)
    classes = recipe.classes or (len(recipe.class_names) or None if zoo else None)
    dense = load_model(recipe.name, classes=classes, input_shape=recipe.input_shape if zoo else None)
    shape = recipe.input_shape or (zoo.input_shape if zoo else None)
    if shape is None and not recipe.input:
        raise InputError(
            "expected the shape of an example of your own model, such as 1,28,28, found none; give it",
            key="input_shape",
        )
    config, pretrained = recipe, None
    if not recipe.input:
        dtype = recipe.input_dtype or (zoo.input_dtype if zoo else "float32")
        tokens = recipe.tokens
        if zoo and dtype == zoo.input_dtype == "int64" and tokens is None:
            tokens = classes or zoo.classes
        config = replace(recipe, input_shape=shape, input_dtype=dtype, tokens=tokens)
    shape_lazily(dense, config)
    if recipe.pretrained is not None:
        pretrained = load_pretrained(dense, recipe.pretrained, new_head=recipe.new_head)
    factorization = recipe
    if zoo:
        batchnorm = zoo.batchnorm if recipe.batchnorm == "refuse" else recipe.batchnorm
        factorization = replace(recipe, exclude=(*recipe.exclude, *zoo.dense_layers), batchnorm=batchnorm)
    new = () if pretrained is None else pretrained.new
    converted, report = convert(dense, factorization, pretrained=pretrained is not None, new=new)
    return FactoredModel(
        dense=dense,
        converted=converted,
        config=config,
        batchnorm=factorization.batchnorm,
        report=report,
        pretrained=pretrained,
        examples=examples,
    )


def make_bundle(
    recipe: Recipe, folder: Path, *, overwrite: bool = False, on_step: Callable[[str], None] = quietly
) -> BuiltBundle:
    """Make the model of a recipe, factor it, and write the bundle that trains it, verified against torch.

    Seeds torch's global generator, from which the initial weights come.

    Args:
        recipe: Recipe of the bundle.
        folder: Folder of the bundle to write, which appears whole or not at all.
        overwrite: Whether to replace an existing bundle.
        on_step: Function that is called with what is being done, in words.

    Raises:
        InputError: A part of the recipe or the folder does not fit, or an operator has no gradient.
        FedparaError: The verification failed, or the disk refuses the write.
    """
    check_output(folder, overwrite=overwrite, folder=True)
    on_step("making the model")
    made = factored_model(recipe)
    converted, config, pretrained, examples = made.converted, made.config, made.pretrained, made.examples
    left_out: dict[str, str] = {}
    bundle, verification = export_bundle(
        converted,
        folder,
        config,
        overwrite=overwrite,
        examples=examples,
        on_step=on_step,
        on_left_out=left_out.__setitem__,
    )
    fidelity = None
    interface = bundle.interface
    if pretrained is not None and all(spec.name in examples for spec in interface.inputs):
        on_step("comparing with the pretrained model")
        first = pretrained.new[0].rpartition(".")[0] if pretrained.new else None
        models = deploy(converted, config), deploy(made.dense, config)
        fidelity = compare_fit(*models, interface, examples, new=first)
    on_step("measuring the curvature at the start")
    return BuiltBundle(
        bundle=bundle,
        report=made.report,
        verification=verification,
        left_out=left_out,
        pretrained=pretrained,
        fidelity=fidelity,
        rates=_rates(made, bundle),
    )


def _rates(made: FactoredModel, bundle: Bundle) -> StableRates | None:
    """Stable rates of both models for plain SGD; None where they are not known."""
    config = made.config
    if config.optimizer != "sgd" or config.of_weights:
        return None
    try:
        factored = deploy(made.converted, config)
        dense = None
        if made.report.converted:
            alike = Factorization(kind="dense", freeze=config.freeze, batchnorm=made.batchnorm)
            dense = deploy(convert(made.dense, alike)[0], config)
        losses = [loaded(find_head(text)[1]) for text in config.loss]
        interface = bundle.interface
        heads = [replace(head, loss=loss) for head, loss in zip(interface.heads, losses, strict=True)]
        batches = Batches(
            inputs=interface.inputs,
            preprocessings=[argument.preprocessing for argument in factored.arguments],
            heads=heads,
            seed=config.seed,
            examples=made.examples,
        )
        return stable_rates(factored, dense, heads, batches)
    except Exception:  # noqa: BLE001  (of the user's model, whose export has succeeded: this is a hint)
        return None
