"""Bundles and engines that a worker keeps open: opening an engine costs as much as many steps."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from device_runtime.engines.protocol import Engine
from device_runtime.engines.registry import open_engine
from fedpara_edge.formats.bundle import Bundle, open_bundle
from fedpara_edge.simulation.torchengine.choice import TorchSource


class _Open(threading.local):
    """Engines of this thread with their initial states, the one that was used last at the end."""

    def __init__(self) -> None:
        self.engines: OrderedDict[Model, tuple[Engine, Mapping[str, NDArray[Any]]]] = OrderedDict()


_open = _Open()


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model of a federation, as a worker opens it.

    Args:
        bundle: Bundle folder.
        engine: Name of the engine.
        torch: Source of the engine `torch`, which takes the place of the other; None for that.
        kept: Number of engines, of this model and others, that a worker keeps open.
    """

    bundle: Path
    engine: str
    torch: TorchSource | None = None
    kept: int = field(default=1, compare=False)


def fresh_engine(model: Model) -> Engine:
    """An engine as it is when it is new: with initial weights and a fresh optimizer.

    Raises:
        FedparaError: The bundle is damaged, or the engine can't be opened.
    """
    kept = _open.engines
    if model in kept:
        kept.move_to_end(model)
        engine, initial = kept[model]
        engine.restore(initial)
        return engine
    while len(kept) >= model.kept:
        kept.popitem(last=False)
    engine = open_new_engine(bundle_at(model.bundle), model)
    kept[model] = engine, engine.state()
    return engine


def open_new_engine(bundle: Bundle, model: Model) -> Engine:
    """Open the engine of a model.

    Raises:
        FedparaError: The bundle is damaged, or the engine can't be opened.
    """
    if model.torch is None:
        return open_engine(bundle, model.engine, threads=1)
    from fedpara_edge.simulation.torchengine.engine import open_engine as open_torch_engine

    return open_torch_engine(bundle, model.torch)


@lru_cache(maxsize=16)
def bundle_at(path: Path) -> Bundle:
    """The bundle in a folder, verified when it is first asked for.

    Raises:
        InputError: There is no bundle, or one of another release.
        WrongBundleError: The bundle is damaged.
    """
    return open_bundle(path)
