"""Bundles to fold, and what is in a folded model, for tests."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from export import export_bundle
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.folded import stated_options
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import Weights, read_weights


def quick_export(model: nn.Module, folder: Path, shape: tuple[int, ...], engine: str, **more: Any) -> Bundle:
    """A bundle whose training nobody verifies, which takes most of the time of an export."""
    options: dict[str, Any] = {"name": "test", "input_shape": shape, "input_dtype": "float32", "engines": (engine,)}
    with patch("export.exporter.verify", return_value={}):
        return export_bundle(model, folder, ExportConfig(**{**options, **more}))[0]


def initial_weights(bundle: Bundle) -> Weights:
    return read_weights(bundle.file(WEIGHTS))


def initializers(path: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def run(path: Path, x: NDArray[Any]) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    for name, value in stated_options(path.read_bytes()).items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    output: NDArray[Any] = session.run(["logits"], {"x": x})[0]
    return output


def assert_plain(path: Path) -> None:
    """Standard operators, readable by onnxruntime 1.19, without loss, label, dropout or anything of the exporter."""
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version <= 10
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert not {"Dropout", "Identity", "SoftmaxCrossEntropyLoss", "LogSoftmax", "Split"} & {
        node.op_type for node in model.graph.node
    }
    assert b"site-packages" not in path.read_bytes()
