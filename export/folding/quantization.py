"""Conversion of a folded model to int8, by onnxruntime's quantization."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from export.folding.inference import replace

_QUANTIZED = ["Conv", "Gemm", "MatMul"]
_CALIBRATION_BATCH = 32


def to_int8(model: onnx.ModelProto, calibration: Mapping[str, NDArray[Any]] | None) -> onnx.ModelProto:
    """Quantize the weights of convolutions and matrix products to 8 bits, one scale for each output channel.

    The weights of LSTM and GRU are stored likewise, but computed with in float32: quantized, these operators would not
    be standard ones.

    Args:
        model: Model in float32.
        calibration: Raw inputs [N, ...] by name, whose activations fix the ranges of activations (QuantizeLinear and
            DequantizeLinear around every operator). Without them, the range is determined anew for each batch
            (DynamicQuantizeLinear, ConvInteger, MatMulInteger), so that a row's outputs depend a little on the others.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(_with_own_weights(model), source)
        if calibration is None:  # ConvInteger with signed weights exists from onnxruntime 1.20 on, and is slow
            quantize_dynamic(
                source, target, per_channel=True, weight_type=QuantType.QUInt8, op_types_to_quantize=_QUANTIZED
            )
        else:
            quantize_static(
                source,
                target,
                _Batches(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=_QUANTIZED,
            )
        quantized = onnx.load(target)
    _store_recurrent_weights(quantized.graph)
    return quantized


def _store_recurrent_weights(graph: onnx.GraphProto) -> None:
    """Store weights [directions, GH, I] in int8, behind a DequantizeLinear with a scale for every row [GH]."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    recurrent = [node for node in graph.node if node.op_type in ("LSTM", "GRU")]
    made = []
    for name in dict.fromkeys(name for node in recurrent for name in node.input[1:3] if name in weights):
        value = numpy_helper.to_array(weights[name])
        scale = np.maximum(np.abs(value).max(axis=(0, 2)) / 127, np.finfo(np.float32).tiny)
        stored = np.rint(value / scale[:, None]).astype(np.int8)
        weights[name].CopyFrom(numpy_helper.from_array(stored, f"{name}.int8"))
        zero = np.zeros(len(scale), np.int8)  # without it, onnxruntime crashes where it makes signed weights unsigned
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        graph.initializer.append(numpy_helper.from_array(zero, f"{name}.zero"))
        made.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.int8", f"{name}.scale", f"{name}.zero"],
                [name],
                name=f"{name}.dequantize",
                axis=1,
            )
        )
    replace(graph.node, [*made, *graph.node])


def _with_own_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy in which no Gemm shares its weight: onnxruntime transposes it in place, whatever else reads it."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = {name for node in copied.graph.node if node.op_type != "Gemm" for name in node.input}
    for node in copied.graph.node:
        if node.op_type == "Gemm" and node.input[1] in weights:
            weight = node.input[1]
            if weight in taken:
                node.input[1] = f"{node.output[0]}.weight"
                copied.graph.initializer.add().CopyFrom(weights[weight])
                copied.graph.initializer[-1].name = node.input[1]
            taken.add(weight)
    return copied


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Inputs of a calibration, batch by batch."""

    def __init__(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        starts = range(0, len(next(iter(inputs.values()))), _CALIBRATION_BATCH)
        self._feeds = (
            {name: array[start : start + _CALIBRATION_BATCH] for name, array in inputs.items()} for start in starts
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Next batch; None after the last."""
        return next(self._feeds, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the advice that onnxruntime's quantization logs, and the warnings of an older one with a newer onnx."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
