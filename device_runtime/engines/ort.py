"""onnxruntime as a device wants it: imported without torch, quiet, and with errors that have names.

Plain onnxruntime and onnxruntime-training-cpu are both imported as `onnxruntime`. The second imports torch where it is
installed, for Python classes that no engine uses.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpara_edge.errors import FedparaError


@contextmanager
def _without_torch() -> Iterator[None]:
    """Make the import of `onnxruntime.training` fail, which `onnxruntime` expects and passes over."""
    training = "onnxruntime.training"
    if "onnxruntime" in sys.modules:
        yield
        return
    sys.modules[training] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[training]


with _without_torch():
    from onnxruntime import (
        GraphOptimizationLevel,
        InferenceSession,
        IOBinding,
        SessionOptions,
        __version__,
        set_seed,
    )
    from onnxruntime.capi import _pybind_state as native

OLDEST = (1, 19)
"""The oldest release that reads our graphs: opset 18 in ONNX IR version 10."""

if tuple(int(number) for number in __version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"onnxruntime {__version__} is too old", name="onnxruntime")

ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(entry for entry in vars(native).values() if isinstance(entry, type) and issubclass(entry, Exception)),
)
"""What onnxruntime raises; its own classes derive from nothing but Exception."""


def message_of(error: Exception) -> str:
    """What onnxruntime says, in one line."""
    return " ".join(str(error).split())


@contextmanager
def running(what: Path, rows: int) -> Iterator[None]:
    """Have an error of onnxruntime say what was running.

    Args:
        what: the file with the graph.
        rows: in the batch.

    Raises:
        FedparaError: onnxruntime gives up, mostly for want of memory.
    """
    try:
        yield
    except ERRORS as error:
        raise FedparaError(
            f"{what}: expected to run on {rows} rows, found {message_of(error)}; "
            "reduce the batch size, or train with more micro-batches"
        ) from error


_FATAL = 4  # of onnxruntime's severities; its errors are raised as well
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def session_options(threads: int | None, *, constant_weights: bool = False) -> SessionOptions:
    """Options of every session.

    Args:
        threads: for the operators; None for as many as there are cores.
        constant_weights: whether to lay out images for blocked convolutions, whose weights must be constants.
    """
    options = SessionOptions()
    if not constant_weights:
        options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = _FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def keep_freed_memory() -> None:
    """Have glibc keep the buffers of a step for the next one, which otherwise faults them in again.

    For onnxruntime-training; plain sessions have an arena for that. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that every release takes
            mallopt(_M_TRIM_THRESHOLD, 1 << 30)


__all__ = [
    "ERRORS",
    "IOBinding",
    "InferenceSession",
    "SessionOptions",
    "keep_freed_memory",
    "message_of",
    "native",
    "running",
    "session_options",
    "set_seed",
]
