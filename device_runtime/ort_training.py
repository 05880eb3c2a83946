"""The engine `ort-training`: onnxruntime-training's artifacts through its compiled classes, without torch."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.bundle import Bundle
from fedpara_edge.errors import FedparaError, WrongBundleError


@contextmanager
def _without_torch() -> Iterator[None]:
    """Import onnxruntime as on a device: where torch is installed it imports all of that, for classes unused here."""
    training = "onnxruntime.training"
    if "onnxruntime" in sys.modules:
        yield
        return
    sys.modules[training] = None  # type: ignore[assignment]  # makes the import of it fail, which is expected there
    try:
        yield
    finally:
        del sys.modules[training]


with _without_torch():
    from onnxruntime import SessionOptions, set_seed
    from onnxruntime.capi import _pybind_state as ort

    try:
        from onnxruntime.capi._pybind_state import Module, Optimizer, load_checkpoint, save_checkpoint
    except ImportError as error:
        message = "the onnxruntime here cannot train; pip uninstall it first"
        raise ImportError(message, name="onnxruntime") from error

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def _keep_freed_memory() -> None:
    """Have glibc keep the buffers of a step for the next one, which otherwise faults them in again.

    Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that every release takes
            mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_CPU = ort.OrtDevice(ort.OrtDevice.cpu(), ort.OrtDevice.default_memory(), 0)
_CHECKPOINT = "ort-training.checkpoint"


def open_engine(bundle: Bundle, *, threads: int | None = None) -> OrtTraining:
    """Load a bundle's artifacts.

    Args:
        bundle: a verified bundle with the engine's files.
        threads: for the operators; None for as many as there are cores.

    Raises:
        WrongBundleError: onnxruntime-training refuses the files.
    """
    _keep_freed_memory()
    return OrtTraining(bundle, threads=threads)


class OrtTraining:
    """The bundle in onnxruntime-training; implements `Engine`."""

    name = "ort-training"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._bundle = bundle
        self._names = [tensor.name for tensor in bundle.manifest.layout.with_role("shared", "personal")]
        self._options = SessionOptions()
        self._options.log_severity_level = 3
        if threads is not None:
            self._options.intra_op_num_threads = threads
        self._open(bundle.file("checkpoint"))

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Set tensors by name."""
        for name, tensor in tensors.items():
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor, np.float32), _CPU)
            self._state.copy_parameter_from(name, value)

    def step(self, x: NDArray[Any], y: NDArray[Any], *, learning_rate: float, seed: int) -> float:
        """One optimizer step; the loss before it."""
        set_seed(seed)  # the generator of dropout masks
        fetches = ort.OrtValueVector()
        self._module.train_step([x, y], fetches)
        self._optimizer.set_learning_rate(learning_rate)
        self._optimizer.optimizer_step()
        self._module.lazy_reset_grad()
        return float(fetches[0].numpy())

    def evaluate(self, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, NDArray[np.float32]]:
        """Mean loss and outputs, without dropout."""
        fetches = ort.OrtValueVector()
        self._module.eval_step([x, y], fetches)
        return float(fetches[0].numpy()), fetches[1].numpy()

    def read(self) -> dict[str, NDArray[np.float32]]:
        """Copies of the trained tensors."""
        return {name: np.array(self._state.get_parameter(name).data.numpy()) for name in self._names}

    def state(self) -> dict[str, NDArray[Any]]:
        """The runtime's own checkpoint, optimizer state included, as bytes."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            try:
                save_checkpoint(self._state, str(path), True)
            except RuntimeError as error:
                raise FedparaError(
                    f"{path}: expected to write the engine's state, found {' '.join(str(error).split())}; "
                    "free space in the folder for temporary files (TMPDIR)"
                ) from error
            return {_CHECKPOINT: np.frombuffer(path.read_bytes(), np.uint8)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what `state` returned."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            path.write_bytes(state[_CHECKPOINT].tobytes())
            self._open(path)

    def _open(self, checkpoint: Path) -> None:
        try:
            self._state = load_checkpoint(str(checkpoint))
            self._module = Module(
                str(self._bundle.file("training_model.onnx")),
                self._state,
                str(self._bundle.file("eval_model.onnx")),
                _CPU,
                self._options,
            )
            self._optimizer = Optimizer(
                str(self._bundle.file("optimizer_model.onnx")), self._state, _CPU, self._options
            )
        except RuntimeError as error:
            raise WrongBundleError(
                f"{self._bundle.path}: expected artifacts that onnxruntime-training loads, found {error}; export again"
            ) from error
