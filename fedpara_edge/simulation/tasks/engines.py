"""Bundles and engines that a worker process keeps open: opening an engine costs as much as many steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from device_runtime.engines.protocol import Engine
from device_runtime.engines.registry import open_engine
from fedpara_edge.formats.bundle import Bundle, open_bundle


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle folder, and the name of the engine to use it with."""

    bundle: Path
    engine: str


class EngineStore:
    """The engines that were used last.

    Args:
        most: how many to keep.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Model, tuple[Engine, Mapping[str, NDArray[Any]]]] = OrderedDict()

    def fresh(self, model: Model) -> Engine:
        """An engine as it is when it is new: with initial weights and a fresh optimizer.

        Raises:
            FedparaError: as `open_bundle` and `open_engine`.
        """
        if model in self._kept:
            self._kept.move_to_end(model)
            engine, initial = self._kept[model]
            engine.restore(initial)
            return engine
        while len(self._kept) >= self._most:
            self._kept.popitem(last=False)
        engine = open_engine(bundle_at(model.bundle), model.engine, threads=1)
        self._kept[model] = engine, engine.state()
        return engine


@lru_cache(maxsize=16)
def bundle_at(path: Path) -> Bundle:
    """A bundle, verified when it is first asked for.

    Raises:
        InputError, WrongBundleError: as `open_bundle`.
    """
    return open_bundle(path)


engines = EngineStore(most=1)
"""Of this process; `processes.start_worker` sets how many."""
