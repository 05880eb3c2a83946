"""The bundles of a plan, made before anything is trained, and whether they go with the rest of it."""

from __future__ import annotations

from pathlib import Path

from device_runtime.data import open_data
from device_runtime.engines.registry import open_engine
from device_runtime.epochs import count_steps
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle, open_bundle
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.simulation.data.clients import Clients
from fedpara_edge.simulation.folder import JobFolder
from fedpara_edge.simulation.plan.plan import Arm


def make_model(recipe: Recipe, folder: Path) -> None:
    """Make a bundle, in a process that brings in torch for it and trains nothing.

    Raises:
        FedparaError: as `export.make_bundle`.
    """
    from export import make_bundle

    make_bundle(recipe, folder)


def check_bundle(arm: Arm, folder: JobFolder, clients: Clients) -> Bundle:
    """Open a bundle, and find out whether its devices can train it on their data as the arm says.

    Raises:
        InputError: an engine, an optimizer, an array or a number of examples does not fit.
        WrongBundleError: the bundle was changed.
    """
    bundle = open_bundle(folder.bundle)
    open_engine(bundle, arm.train.engine, threads=1)
    config = arm.train.config(seed=0)
    config.algorithm.check_optimizer(bundle.manifest.optimizer)
    try:
        for client in clients.clients:
            count_steps(open_data(clients.train(client.name), bundle.manifest), config)
            if client.test_examples:
                open_data(clients.test(client.name), bundle.manifest)
        if clients.test_examples:
            open_data(clients.common, bundle.manifest)
    except InputError as error:
        raise InputError(f"arms.{arm.name}: its model and the data: {error}") from error
    return bundle
