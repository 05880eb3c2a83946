"""Folding of a bundle and weights (`fold`) into one inference model, which is verified before it is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime import InferenceSession, SessionOptions

from export.complaints import complaint
from export.folding.composing import Composed, compose_layers
from export.folding.half import to_float16
from export.folding.inference import inference_graph, replace
from export.folding.inputs import random_inputs
from export.folding.ranges import find_ranges, measure
from fedpara_edge._version import __version__
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.accuracy import count_correct, count_labels
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.folded import INT8_OPTIONS, METADATA_KEY, FoldedSpec, Precision, stated_options, with_digest
from fedpara_edge.formats.interface import Interface
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.atomic import check_output, replacing_file

IR_VERSION = 10  # the newest that onnxruntime 1.19 and 1.20 read
TOLERANCES: dict[Precision, float] = {"float32": 1e-4, "float16": 0.05, "int8": 0.5}
"""Largest relative errors of the outputs: float32 rounds; the others, seen at 4e-4 and at 0.02 to 0.05, are wrong far
above that."""
_TRACED_EXAMPLES, _RANDOM_EXAMPLES, _CALIBRATION_EXAMPLES, _BATCH = 3, 16, 512, 256


Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name, with as many rows each."""


class Examples(Protocol):
    """Examples to verify with; `device_runtime.Dataset` is one."""

    @property
    def examples(self) -> int:
        """Number of examples."""
        ...

    def rows(self, rows: NDArray[Any]) -> tuple[Arrays, Arrays]:
        """Inputs and labels of the examples with given numbers, by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Folding:
    """Folded model as it was written, and its distance from the factored model.

    Args:
        spec: Spec of the folded model that is stored in the file.
        layers: Names of the factored layers whose weight was composed.
        bytes: Size of the file in bytes.
        error: ‖outputs - factored outputs‖ / ‖factored outputs‖, over the examples if there are any, else over random
            inputs.
        examples: Number of examples; 0 without data.
        accuracy: Accuracy of the folded model on the examples, in [0, 1]; None without data, and without labels to
            predict.
        factored_accuracy: Accuracy of the factored model on the examples, likewise.
    """

    spec: FoldedSpec
    layers: tuple[str, ...]
    bytes: int
    error: float
    examples: int
    accuracy: float | None
    factored_accuracy: float | None


def fold(
    bundle: Bundle,
    weights: Weights,
    path: Path | str,
    *,
    personal: Mapping[str, NDArray[Any]] | None = None,
    precision: Precision = "float32",
    data: Examples | None = None,
    max_drop: float = 1.0,
    overwrite: bool = False,
) -> Folding:
    """Write one inference model for a bundle with given weights.

    Args:
        bundle: Verified bundle.
        weights: Weights of that bundle.
        path: Path of the `.onnx` file to write, which appears whole or not at all.
        personal: Personal tensors of a device by name; None for the initial ones.
        precision: Precision to compute in; see `half.to_float16` and `quantization.to_int8`.
        data: Examples to measure error and accuracy on, and to calibrate `int8` with; None for random inputs around the
            mean that the model subtracts.
        max_drop: Largest drop in accuracy on the data that float16 or int8 may cause, in percentage points.
        overwrite: Whether to replace an existing file.

    Returns:
        Folded model as it was written, with what was measured.

    Raises:
        InputError: The output can't be written to that path, an option does not fit, or the bundle has no forward
            graph.
        WrongBundleError: The weights or the graph do not fit the bundle, or no runtime takes the graph.
        FedparaError: The folded model differs from the factored one by more than it may, or the disk refuses the write.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    if not 0 <= max_drop <= 100:
        raise InputError(f"max_drop: expected points of accuracy from 0 to 100, found {max_drop}")
    manifest = bundle.manifest
    if weights.fingerprint != manifest.fingerprint:
        raise WrongBundleError(
            f"{bundle.path}: expected weights of bundle {manifest.fingerprint[:12]}…, found those of "
            f"{weights.fingerprint[:12]}…; use weights that were exported or aggregated with it"
        )
    local = {tensor.name for tensor in manifest.layout.with_role("personal")}
    initial = {name: value for name, value in bundle.read_initial_personal().items() if name in local}
    spec = FoldedSpec(
        model=manifest.model,
        fingerprint=manifest.fingerprint,
        round=weights.round,
        precision=precision,
        personal=bool(personal),
        interface=manifest.interface,
    )
    with _blaming_the_graph(bundle):
        factored = inference_graph(bundle, {**weights.whole, **initial, **(personal or {})})
        reference = _session(factored.SerializeToString())
        composed = compose_layers(factored, manifest.layout, random_inputs(manifest.interface, _TRACED_EXAMPLES))
    random = random_inputs(manifest.interface, _RANDOM_EXAMPLES, composed.model)
    content = _serialized(_in_precision(composed, precision, random, data), spec)
    batches = [(random, None)] if data is None else _batches(data)
    check = _compare(reference, _session(content), manifest.interface, batches)
    _refuse_if_far(path, spec, check, max_drop)
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)
    return Folding(
        spec=spec,
        layers=composed.layers,
        bytes=len(content),
        error=check.error,
        examples=0 if data is None else data.examples,
        accuracy=check.accuracy,
        factored_accuracy=check.factored_accuracy,
    )


@contextmanager
def _blaming_the_graph(bundle: Bundle) -> Iterator[None]:
    """Have an error of a library name the bundle whose graph it could not take."""
    try:
        yield
    except (FedparaError, OSError):
        raise
    except Exception as error:  # the exceptions of the runtimes have no common base
        raise WrongBundleError(
            f"{bundle.path}: expected a graph that can be folded, found {complaint(error)}; export the bundle again"
        ) from error


def _in_precision(composed: Composed, precision: Precision, random: Arrays, data: Examples | None) -> onnx.ModelProto:
    calibration = None if data is None else _calibration(data)
    examples = [random] if calibration is None else [random, calibration]
    match precision:
        case "float32":
            return composed.model
        case "float16":
            ranges = find_ranges(composed.model, composed.parameters, measure(composed.model, examples))
            return to_float16(composed.model, composed.parameters, ranges)
        case "int8":
            from export.folding.quantization import to_int8  # which, in onnxruntime-training, imports torch

            return to_int8(composed.model, calibration)


def _calibration(data: Examples) -> Arrays:
    """Inputs of evenly spaced examples, as the data may be in the order of its labels."""
    count = min(data.examples, _CALIBRATION_EXAMPLES)
    return data.rows(np.arange(count) * data.examples // count)[0]


def _serialized(model: onnx.ModelProto, spec: FoldedSpec) -> bytes:
    """Content of the file: the model with our metadata entry, for the oldest runtime that is supported."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "fedpara-edge", __version__
    model.graph.name = "fedpara-edge folded"
    replace(
        model.graph.output,
        [
            helper.make_tensor_value_info(output.name, TensorProto.FLOAT, ["batch", *output.shape])
            for output in spec.interface.outputs
        ],
    )
    options = INT8_OPTIONS if spec.precision == "int8" else {}
    helper.set_model_props(model, {METADATA_KEY: spec.to_json(), **options})
    onnx.checker.check_model(model, full_check=True)
    return with_digest(model.SerializeToString(deterministic=True))


def _batches(data: Examples) -> Iterator[tuple[Arrays, Arrays]]:
    for start in range(0, data.examples, _BATCH):
        yield data.rows(np.arange(start, min(start + _BATCH, data.examples)))


def _session(content: bytes) -> InferenceSession:
    options = SessionOptions()
    options.log_severity_level = 4
    for name, value in stated_options(content).items():
        options.add_session_config_entry(name, value)
    return InferenceSession(content, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class _Comparison:
    """Relative error of the folded model's outputs, and both accuracies where there are labels to predict."""

    error: float
    accuracy: float | None
    factored_accuracy: float | None


def _compare(
    factored: InferenceSession,
    folded: InferenceSession,
    interface: Interface,
    batches: Iterable[tuple[Arrays, Arrays | None]],
) -> _Comparison:
    """Run both models on the same batches.

    Raises:
        FedparaError: An output of the factored model is not finite.
    """
    difference = norm = 0.0
    correct, factored_correct, labels = 0, 0, 0
    names = [output.name for output in interface.outputs]
    for x, y in batches:
        expected, found = (dict(zip(names, session.run(names, dict(x)), strict=True)) for session in (factored, folded))
        if not all(np.isfinite(output).all() for output in expected.values()):
            unless = (
                " or don't take random rows; take those of an earlier round, or fold with --data" if y is None else ""
            )
            raise FedparaError(
                "factored model: expected finite outputs, found NaN or Inf: these weights diverged"
                f"{unless or '; take those of an earlier round'} (nothing was written)"
            )
        if not all(np.isfinite(output).all() for output in found.values()):
            return _Comparison(math.inf, None, None)
        for name, output in expected.items():
            difference += float(np.sum((found[name].astype(np.float64) - output) ** 2))
            norm += float(np.sum(output.astype(np.float64) ** 2))
        for head in interface.heads:
            if y is not None:
                label = y[head.label.name]
                correct += count_correct(head.loss, found[head.output.name], label)
                factored_correct += count_correct(head.loss, expected[head.output.name], label)
                labels += count_labels(head.loss, label)
    error = math.sqrt(difference / max(norm, 1e-30))
    if not labels:
        return _Comparison(error, None, None)
    return _Comparison(error, correct / labels, factored_correct / labels)


def _refuse_if_far(path: Path, spec: FoldedSpec, check: _Comparison, max_drop: float) -> None:
    precision = spec.precision
    if math.isinf(check.error):
        raise FedparaError(
            f"{path}: expected finite outputs in {precision}, found NaN or Inf; nothing was written: "
            "choose another precision"
        )
    before, after = check.factored_accuracy, check.accuracy
    if before is not None and after is not None and 100 * (before - after) > max_drop:
        raise FedparaError(
            f"{path}: expected {precision} to cost at most {max_drop:g} points of accuracy, found {before:.2%} "
            f"before and {after:.2%} after; nothing was written: choose another precision or --max-drop"
        )
    if check.error > TOLERANCES[precision]:
        raise FedparaError(
            f"{path}: expected the factored model's outputs within {TOLERANCES[precision]:g} relative, "
            f"found {check.error:.2g}; nothing was written: choose a precision other than {precision}, or "
            "report this model"
        )
