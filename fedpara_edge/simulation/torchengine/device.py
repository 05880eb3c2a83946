"""A device of torch, on which several threads work at the same time: streams, and steps recorded as CUDA graphs.

A recorded function is launched as a whole, where the launches of its hundred kernels one by one would keep the GPU
waiting for Python. What it computes with must stay in place: tensors that are written before each call. While one is
recorded, nothing else happens on the device.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from fedpara_edge.errors import FedparaError, InputError, counted
from fedpara_edge.simulation.torchengine.choice import EngineChoice

ERRORS = (RuntimeError, ValueError, IndexError)
"""Errors of torch, which has no common base for them."""
REMEDY = "fewer clients at once (--workers), smaller batches or more micro-batches need less memory"


class _Sharing:
    """A lock that many hold together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders, self._waiting = 0, 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it together with others, once nobody waits to have it alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._holders >= 0 and not self._waiting)
            self._holders += 1
        try:
            yield
        finally:
            with self._changed:
                self._holders -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it alone for a while, from within `shared`."""
        with self._changed:
            self._holders, self._waiting = self._holders - 1, self._waiting + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._holders == 0)
            self._holders, self._waiting = -1, self._waiting - 1
        try:
            yield
        finally:
            with self._changed:
                self._holders = 1
                self._changed.notify_all()


_sharing = _Sharing()
_recording = threading.Event()
"""Set for as long as nothing failed to be recorded."""
_recording.set()


def prepare(choice: EngineChoice) -> torch.device:
    """The device of a choice, with the precision set for this process.

    Raises:
        InputError: This machine has no such device.
    """
    device = torch.device(choice.device or "cpu")
    if device.type == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as many streams run at a time; 8 otherwise
        if not torch.cuda.is_available():
            raise InputError(
                "expected a GPU that torch can use, found none; install torch for it, or take the device cpu",
                key="device",
            )
        exact = choice.precision in (None, "float32")
        torch.set_float32_matmul_precision("highest" if exact else "high")
        torch.backends.cudnn.allow_tf32 = not exact
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return device


def launch_each() -> None:
    """Record nothing from now on in this process."""
    _recording.clear()


def rounding(choice: EngineChoice) -> AbstractContextManager[object]:
    """Context in which products have the precision of a choice."""
    if choice.precision != "bf16":
        return nullcontext()
    # What it would keep of rounded weights from one call to the next, a recorded step could not make anew.
    return torch.autocast(choice.device or "cpu", torch.bfloat16, cache_enabled=False)


class Lane:
    """The part of a device on which one engine works, one thread at a time.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    @property
    def records(self) -> bool:
        """Whether functions are recorded here."""
        return self._stream is not None

    @contextmanager
    def working(self, rows: int = 0) -> Iterator[None]:
        """Context in which this thread works on the device, on a batch of that many rows.

        Raises:
            FedparaError: Torch fails, usually for lack of memory.
        """
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        try:
            with _sharing.shared(), stream:
                yield
        except ERRORS as error:
            found = " ".join(str(error).split("\n")[0].split())
            batch = f" on {counted(rows, 'row')}" if rows else ""
            raise FedparaError(f"engine torch: expected to run{batch}, found {found}; {REMEDY}") from error

    def call(self, key: Hashable, function: Callable[[], None]) -> None:
        """Call a function, from its second call on as recorded in that.

        Args:
            key: Key of the function, with all that tells it from others.
            function: Function that reads and writes tensors of the device and nothing else, the same ones every time.
        """
        if not self.records or not _recording.is_set():
            function()
        elif key not in self._graphs:
            self._graphs[key] = None
            function()  # the first time, libraries choose their kernels and allocate
        else:
            graph = self._graphs[key] or self._record(key, function)
            function() if graph is None else graph.replay()

    def _record(self, key: Hashable, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Function as a graph, whose memory is that of the other graphs; None if it can't be recorded."""
        pool = next((graph.pool() for graph in self._graphs.values() if graph is not None), None)
        graph = torch.cuda.CUDAGraph()
        with _sharing.alone(), _without_collection():
            if not _recording.is_set():
                return None
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # of the first call, as a graph has memory of its own
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
            except Exception as error:  # noqa: BLE001  # of torch or the model: it is slower then, and as right
                _recording.clear()
                found = " ".join(str(error).split("\n")[0].split())
                print(f"engine torch: recording a step failed, so each is launched by itself: {found}", file=sys.stderr)
                return None
        self._graphs[key] = graph
        return graph


@contextmanager
def _without_collection() -> Iterator[None]:
    """Context in which no garbage is collected, which might be on the device."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
