"""Which engine trains a bundle: the one asked for, or the first that the bundle and this machine both have."""

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
    """Where an engine lives: a module with `open_engine(bundle, threads=...)`, and what must be installed for it."""

    module: str
    requirement: str


ENGINES: dict[str, EngineSource] = {
    "onnxruntime": EngineSource("device_runtime.engines.portable", "onnxruntime>=1.20"),
    "ort-training": EngineSource("device_runtime.engines.ort_training", "onnxruntime-training-cpu==1.19.2"),
}
"""By name, the preferred first: the faster where both can run."""


def open_engine(bundle: Bundle, name: str = "auto", *, threads: int | None = None) -> Engine:
    """Open a bundle in an engine, with the initial weights and a fresh optimizer.

    Args:
        bundle: a verified bundle.
        name: a name in `ENGINES`, or `auto`.
        threads: for the operators; None for as many as there are cores.

    Raises:
        InputError: the name is unknown, the bundle lacks the engine's files, or what it needs is not installed.
        WrongBundleError: the engine refuses the files.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads: expected an integer from 1 to {MAX_THREADS}, found {threads}")
    if name != "auto" and name not in ENGINES:
        raise InputError(f"engine {name!r}: expected auto or one of {', '.join(ENGINES)}")
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
