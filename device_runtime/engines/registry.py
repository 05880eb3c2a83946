"""Registry of engines, and the choice of one: that asked for, or the first that bundle and machine both have."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import cast

from device_runtime.engines.protocol import Engine
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.installation import obstacle

MAX_THREADS = 1024


@dataclass(frozen=True)
class EngineSource:
    """Place of an engine.

    Args:
        module: Name of the module with its `open_engine(bundle, threads=...)`.
        requirement: Package that must be installed for it, as pip takes it.
    """

    module: str
    requirement: str


ENGINES: dict[str, EngineSource] = {
    "onnxruntime": EngineSource("device_runtime.engines.portable", "onnxruntime>=1.20"),
    "ort-training": EngineSource("device_runtime.engines.ort_training", "onnxruntime-training-cpu==1.19.2"),
}
"""Engines by name, the preferred one first: the faster where both can run."""


def open_engine(bundle: Bundle, name: str = "auto", *, threads: int | None = None) -> Engine:
    """Open a bundle in an engine, with the initial weights and a fresh optimizer.

    Args:
        bundle: Verified bundle.
        name: Name of an engine in `ENGINES`, or `auto`.
        threads: Threads for the operators; None for one per core.

    Raises:
        InputError: The name is unknown, the bundle lacks the engine's files, or the engine's package is not installed.
        WrongBundleError: The engine refuses the files.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"expected an integer from 1 to {MAX_THREADS}, found {threads}", key="threads")
    if name != "auto" and name not in ENGINES:
        raise InputError(f"expected auto or one of {', '.join(ENGINES)}, found {name!r}", key="engine")
    there = bundle.manifest.engines
    asked = list(ENGINES) if name == "auto" else [name]
    wanted = [known for known in asked if known in there]
    again = f"export the bundle again with --engine {asked[0]}"
    if not wanted:
        raise InputError(
            f"{bundle.path}: expected the files of engine {' or '.join(asked)}, "
            f"found those of {', '.join(there) or 'none'}; {again}"
        )
    missing: list[str] = []
    for known in wanted:
        try:
            module = importlib.import_module(ENGINES[known].module)
        except ImportError as error:
            if not (error.name or "").startswith("onnxruntime"):
                raise
            missing.append(f"engine {known!r}: expected {ENGINES[known].requirement}, found none ({error})")
        else:
            return cast(Engine, module.open_engine(bundle, threads=threads))
    requirement = ENGINES[wanted[0]].requirement
    install = obstacle(re.split("[=>]", requirement)[0]) or f"pip install '{requirement}'"
    raise InputError(f"{'; '.join(missing)}; {install if asked[0] in wanted else f'{again}, or {install}'}")
