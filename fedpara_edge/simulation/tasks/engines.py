"""Bundles and engines that a worker process keeps open: opening an engine costs as much as many steps."""

from __future__ import annotations

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

_open: OrderedDict[Model, tuple[Engine, Mapping[str, NDArray[Any]]]] = OrderedDict()
"""Engines of this process with their initial states, the one that was used last at the end."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model of a federation, as a worker opens it.

    Args:
        bundle: Bundle folder.
        engine: Name of the engine.
        kept: Number of engines, of this model and others, that a worker keeps open.
    """

    bundle: Path
    engine: str
    kept: int = field(default=1, compare=False)


def fresh_engine(model: Model) -> Engine:
    """An engine as it is when it is new: with initial weights and a fresh optimizer.

    Raises:
        FedparaError: The bundle is damaged, or the engine can't be opened.
    """
    if model in _open:
        _open.move_to_end(model)
        engine, initial = _open[model]
        engine.restore(initial)
        return engine
    while len(_open) >= model.kept:
        _open.popitem(last=False)
    engine = open_engine(bundle_at(model.bundle), model.engine, threads=1)
    _open[model] = engine, engine.state()
    return engine


@lru_cache(maxsize=16)
def bundle_at(path: Path) -> Bundle:
    """The bundle in a folder, verified when it is first asked for.

    Raises:
        InputError: There is no bundle, or one of another release.
        WrongBundleError: The bundle is damaged.
    """
    return open_bundle(path)
