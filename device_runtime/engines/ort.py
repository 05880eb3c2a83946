"""The part of onnxruntime that engines use, imported without torch, quiet, and with errors that can be caught.

Plain onnxruntime and onnxruntime-training-cpu are both imported as `onnxruntime`. The latter imports torch where it is
installed, for Python classes that no engine uses.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpara_edge.errors import FedparaError, counted


@contextmanager
def _without_torch() -> Iterator[None]:
    """Make the import of `onnxruntime.training` fail, which `onnxruntime` tolerates."""
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
"""Oldest release that reads our graphs, which have opset 18 and ONNX IR version 10."""

if tuple(int(number) for number in __version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"onnxruntime {__version__} is too old", name="onnxruntime")

ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(entry for entry in vars(native).values() if isinstance(entry, type) and issubclass(entry, Exception)),
)
"""Errors that onnxruntime raises; its own classes derive directly from Exception."""


_MEMORY = re.compile("bad.?alloc|allocate memory|out of memory", re.IGNORECASE)


def message_of(error: Exception) -> str:
    """Message of an error of onnxruntime, in one line."""
    return " ".join(str(error).split())


@contextmanager
def running(graph: Path, rows: int) -> Iterator[None]:
    """Context in which an error of onnxruntime names the graph that was running.

    Args:
        graph: File with the graph.
        rows: Number of rows in the batch.

    Raises:
        FedparaError: The runtime fails, for lack of memory or as the model does not take that many rows.
    """
    try:
        yield
    except ERRORS as error:
        raise FedparaError(
            f"{graph}: expected to run on {counted(rows, 'row')}, found {message_of(error)}; {remedy_for(error, rows)}"
        ) from error


def remedy_for(error: Exception, rows: int) -> str:
    """Remedy for an error of onnxruntime on a batch of that many rows.

    >>> remedy_for(RuntimeError("std::bad_alloc"), 32)
    'reduce the batch size, or train with more micro-batches'
    >>> remedy_for(RuntimeError("Reshape: the input tensor cannot be reshaped"), 1)
    'if it runs on other numbers of rows, leave batches of 1 out, or export a model that takes any number'
    """
    if _MEMORY.search(str(error)):
        return "reduce the batch size, or train with more micro-batches"
    return f"if it runs on other numbers of rows, leave batches of {rows} out, or export a model that takes any number"


_FATAL = 4  # among onnxruntime's severities; its errors are raised in any case
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def session_options(threads: int | None, *, constant_weights: bool = False) -> SessionOptions:
    """Options for a session.

    Args:
        threads: Threads for the operators; None for one per core.
        constant_weights: Whether to use the image layout of blocked convolutions, which needs constant weights.
    """
    options = SessionOptions()
    if not constant_weights:
        options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = _FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def keep_freed_memory() -> None:
    """Have glibc keep the buffers of a step for the next one, which would otherwise fault them in again.

    Needed for onnxruntime-training only, as plain sessions have an arena. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value that every release accepts
            mallopt(_M_TRIM_THRESHOLD, 1 << 30)


__all__ = [
    "ERRORS",
    "IOBinding",
    "InferenceSession",
    "SessionOptions",
    "__version__",
    "keep_freed_memory",
    "message_of",
    "native",
    "remedy_for",
    "running",
    "session_options",
    "set_seed",
]
