"""Predictions of a folded model, with numpy and any onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.data import Dataset, Inputs, check_inputs, open_inputs
from device_runtime.engines.protocol import Given, named
from fedpara_edge.errors import DivergedError, FedparaError, InputError
from fedpara_edge.formats.accuracy import count_correct, count_labels, predicted, without_ignored
from fedpara_edge.formats.folded import read_folded, stated_options
from fedpara_edge.installation import install_line
from fedpara_edge.metrics import COUNTERS, Counts
from fedpara_edge.storage.atomic import replacing_file

MAX_THREADS = 1024
LABELS = "predicted"


class Predictor:
    """Folded model, ready to run.

    Args:
        path: File that `fedpara-edge fold` wrote.
        threads: Threads for the operators; None for one per core.

    Attributes:
        spec: Description of the model in its file.

    Raises:
        InputError: The file is missing, damaged or not a folded model, the number of threads is out of range, or
            onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise InputError(f"expected an integer from 1 to {MAX_THREADS}, found {threads}", key="threads")
        self.spec, content = read_folded(path)
        self._path = path
        try:
            from device_runtime.engines.ort import ERRORS, InferenceSession, remedy_for, session_options
        except ImportError as error:
            remedy = f"type: {install_line('device')}"
            raise InputError(f"predict: expected onnxruntime, found none ({error}); {remedy}") from error
        self._errors, self._remedy_for = ERRORS, remedy_for
        try:
            options = session_options(threads, constant_weights=True)
            for name, value in stated_options(content).items():
                options.add_session_config_entry(name, value)
            self._session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except ERRORS as error:
            raise InputError(
                f"{path}: expected a model that onnxruntime loads, found {_line(error)}; fold it again"
            ) from error

    def predict(self, x: Given, batch_size: int = 256) -> dict[str, NDArray[np.float32]]:
        """Outputs [N, ...] of raw inputs, by name.

        Args:
            x: Inputs [N, ...] by name, or the only one, with N at least 1, of their dtypes, or any integers for tokens.
            batch_size: Rows at a time.

        Raises:
            InputError: The inputs have another shape or dtype, NaN, Inf or a token out of range; or the batch size is
                not positive.
            DivergedError: An output is not finite.
        """
        interface = self.spec.interface
        inputs = Inputs(path=Path("predict"), arrays=named(x, interface.inputs), interface=interface)
        check_inputs(inputs)
        return self.outputs(inputs, batch_size)

    def outputs(self, data: Inputs, batch_size: int) -> dict[str, NDArray[np.float32]]:
        """Outputs [N, ...] of all rows in their order, by name.

        Raises:
            InputError: A row does not fit, or the batch size is not positive.
            DivergedError: An output is not finite.
            FedparaError: The runtime fails.
        """
        if batch_size < 1:
            raise InputError(f"expected an integer of at least 1, found {batch_size}", key="batch_size")
        names = [spec.name for spec in self.spec.interface.outputs]
        found: list[list[NDArray[np.float32]]] = []
        for start in range(0, data.examples, batch_size):
            rows = np.arange(start, min(start + batch_size, data.examples))
            inputs = data.inputs(rows)
            try:
                outputs = self._session.run(names, dict(inputs))
            except self._errors as error:
                raise FedparaError(
                    f"{self._path}: rows {start} to {rows[-1]}: expected to run them, found {_line(error)}; "
                    f"{self._remedy_for(error, len(rows))}"
                ) from error
            finite = np.all([np.isfinite(part.reshape(len(rows), -1)).all(axis=1) for part in outputs], axis=0)
            if not finite.all():
                remedy = "check the input, or fold weights of an earlier round"
                if self.spec.precision != "float32":
                    remedy = f"fold with --precision float32, as {self.spec.precision} may not hold what it computes"
                raise DivergedError(
                    f"{self._path}: row {start + int(np.argmin(finite))}: expected finite outputs, found NaN or Inf; "
                    f"{remedy}"
                )
            found.append(outputs)
        return {name: np.concatenate(parts) for name, parts in zip(names, zip(*found, strict=True), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of a model for a dataset.

    Args:
        outputs: Outputs of the model by name, float32 [N, ...].
        labels: Predicted labels by the name of their array, int64 [N, ...] (`accuracy.predicted`); without those that
            are numbers.
        accuracy: Fraction of the labels that are predicted correctly, in [0, 1]; None without labels, and if all are
            numbers.
        counts: Counts from which all metrics are computed, by the name of the array of labels; none without labels.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    labels: Mapping[str, NDArray[np.int64]]
    accuracy: float | None
    counts: Mapping[str, Counts] = field(default_factory=dict, repr=False, compare=False)


def predict_all(predictor: Predictor, data: Inputs, batch_size: int = 256) -> Predictions:
    """Predict a dataset; one with labels (`Dataset`) also gives the accuracy.

    Raises:
        InputError: A row or a label does not fit, or the batch size is not positive.
        DivergedError: An output is not finite.
        FedparaError: The runtime fails.
    """
    heads = predictor.spec.interface.heads
    outputs = predictor.outputs(data, batch_size)
    counts: dict[str, Counts] = {}
    correct, count = 0, 0
    if isinstance(data, Dataset):
        y = data.labels(np.arange(data.examples))
        for head in heads:
            output, label = outputs[head.output.name], y[head.label.name]
            counts[head.label.name] = COUNTERS[head.loss.labels](output, without_ignored(head.loss, label))
            correct += count_correct(head.loss, output, label)
            count += count_labels(head.loss, label)
    labels = {head.label.name: predicted(head.loss, outputs[head.output.name]) for head in heads}
    return Predictions(
        outputs=outputs,
        labels={name: found for name, found in labels.items() if found is not None},
        accuracy=correct / count if count else None,
        counts=counts,
    )


def predict(model: Path | str, data: Path | str, *, batch_size: int = 256, threads: int | None = None) -> Predictions:
    """Predict data with a folded model.

    Args:
        model: File that `fold` wrote.
        data: An `.npz` file, or a folder of `.npy` files, with the inputs; labels beside them give the accuracy.
        batch_size: Rows at a time.
        threads: Threads of onnxruntime; None for one per core.

    Raises:
        InputError: The model or the data is missing, damaged or does not fit, or onnxruntime is not installed.
        DivergedError: An output is not finite.
        FedparaError: The runtime fails.
    """
    predictor = Predictor(Path(model), threads=threads)
    return predict_all(predictor, open_inputs(Path(data), predictor.spec), batch_size)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write an `.npz` with the outputs under their names, and the predicted labels.

    Labels, if any, are called `predicted`; where there are several, `predicted_` and the name of the array of labels.

    Raises:
        FedparaError: The disk refuses the write.
    """
    several = len(predictions.labels) > 1
    labels = {f"{LABELS}_{name}" if several else LABELS: found for name, found in predictions.labels.items()}
    arrays: dict[str, Any] = {**predictions.outputs, **labels}
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
