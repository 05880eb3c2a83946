"""The bundles of a plan, made before anything is trained, and compared with the data and the arm that they are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from device_runtime.data import open_data
from device_runtime.epochs import count_steps
from device_runtime.sources import PLAIN, Reading, Wanted, as_arrays
from device_runtime.sources.reading import given
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle, open_bundle
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.simulation.data.clients import Clients
from fedpara_edge.simulation.plan.plan import Arm
from fedpara_edge.simulation.tasks.engines import Model, open_new_engine


def make_model(recipe: Recipe, folder: Path) -> None:
    """Make a bundle, in a process that imports torch for it and trains nothing.

    Args:
        recipe: Recipe of the bundle.
        folder: Bundle folder to make.

    Raises:
        FedparaError: The recipe does not fit, or the bundle failed its verification (`export.make_bundle`).
    """
    from export import make_bundle

    make_bundle(with_example_as_arrays(recipe), folder)


def with_example_as_arrays(recipe: Recipe, reading: Reading = PLAIN) -> Recipe:
    """Recipe whose example, if it has one, is arrays.

    Args:
        recipe: Recipe, with a source (`device_runtime.sources`) or arrays as its example.
        reading: Options for reading a source.

    Raises:
        InputError: The source does not fit, or there are options and no source.
    """
    if recipe.example is None:
        if reading != PLAIN:
            raise InputError("expected for the example, found without; give it, or leave it out", key=given(reading)[0])
        return recipe
    wanted = Wanted(recipe.input_shape, recipe.input_dtype or "")
    return replace(recipe, example=as_arrays(recipe.example, reading, wanted))


def check_bundle(arm: Arm, model: Model, clients: Clients) -> Bundle:
    """Open a bundle whose devices can train it on their data as the arm says.

    Args:
        arm: Arm that the bundle is for.
        model: The model, as a worker opens it.
        clients: Clients and their rows.

    Raises:
        InputError: An engine, an optimizer, an array or a number of examples does not fit.
        WrongBundleError: The bundle was changed.
    """
    bundle = open_bundle(model.bundle)
    open_new_engine(bundle, model)
    try:
        arm.train.client_algorithm.check_optimizer(bundle.manifest.optimizer)
    except InputError as error:
        raise error.under("model") from error
    try:
        for client in clients.clients:
            count_steps(open_data(clients.train(client.name), bundle.manifest), arm.train)
            if client.test_examples:
                open_data(clients.test(client.name), bundle.manifest)
        if clients.test_examples:
            open_data(clients.common, bundle.manifest)
    except InputError as error:
        if error.key is not None:
            raise error.under("train") from error
        raise InputError(f"its model and the data: {error}", code=error.code) from error
    return bundle
