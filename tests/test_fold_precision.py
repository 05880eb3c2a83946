"""Folded models in float16 and int8: accurate, or refused."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from folded import assert_plain, initializers, quick_export, run
from onnx import TensorProto, helper, numpy_helper

from device_runtime import Dataset, open_engine
from device_runtime.batches import epoch_batches
from export.folding.fold import TOLERANCES, fold
from export.folding.half import to_float16
from fedpara_edge.demo import IMAGES
from fedpara_edge.errors import FedparaError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.folded import INT8_OPTIONS, read_folded, stated_options
from fedpara_edge.formats.weights import Weights
from fedpara_edge.nn import ZOO

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Weights, Dataset]:
    """A cnn after one epoch on part of Fashion-MNIST, and data to test it with."""
    torch.manual_seed(0)
    model = ZOO["cnn"].factory()
    folder = tmp_path_factory.mktemp("trained") / "bundle"
    bundle = quick_export(model, folder, (1, 28, 28), "ort-training", input_dtype="uint8", mean=(0.286,), std=(0.353,))
    spec = bundle.manifest
    with np.load(IMAGES) as data:
        parts = {
            name: Dataset(
                path=IMAGES,
                arrays={"x": data[f"x_{name}"][:count], "y": data[f"y_{name}"][:count]},
                interface=spec.interface,
            )
            for name, count in (("train", 2500), ("test", 600))
        }
    engine = open_engine(bundle, threads=2)
    for x, y in epoch_batches(parts["train"], batch_size=16, seed=0, epoch=0):
        engine.step(x, y, learning_rate=0.1, seed=0)
    weights = Weights(spec.fingerprint, 1, spec.layout, engine.read())
    return bundle, weights, parts["test"]


Trained = tuple[Bundle, Weights, Dataset]


def test_a_model_chooses_no_options_of_a_session_but_ours() -> None:
    model = onnx.ModelProto()
    onnx.helper.set_model_props(
        model, {"session.use_ort_model_bytes_directly": "1", **dict.fromkeys(INT8_OPTIONS, "2")}
    )
    assert stated_options(model.SerializeToString()) == {}


@pytest.mark.parametrize(
    ("precision", "calibrated", "error", "bytes_of_float32", "dtype", "kept"),
    [
        ("float32", True, 1e-5, 1.0, np.float32, {"conv4.weight"}),
        ("float16", True, 5e-3, 0.52, np.float16, {"conv4.weight"}),
        ("int8", True, 0.1, 0.3, np.int8, {"conv4.weight_quantized"}),
        ("int8", False, 0.2, 0.3, np.uint8, {"conv4.weight_quantized"}),
    ],
)
def test_precisions_keep_the_accuracy(
    precision: Any,
    calibrated: bool,
    error: float,
    bytes_of_float32: float,
    dtype: type,
    kept: set[str],
    trained: Trained,
    tmp_path: Path,
) -> None:
    bundle, weights, data = trained
    path = tmp_path / "model.onnx"
    result = fold(bundle, weights, path, precision=precision, data=data if calibrated else None)
    assert result.error <= error
    assert result.bytes <= bytes_of_float32 * 1.6e6
    assert_plain(path)
    arrays = initializers(path)
    assert {name: arrays[name].dtype for name in kept} == dict.fromkeys(kept, np.dtype(dtype))
    assert (read_folded(path)[0].precision, read_folded(path)[0].round) == (precision, 1)
    assert stated_options(path.read_bytes()) == (INT8_OPTIONS if precision == "int8" else {})
    x, y = data.arrays["x"], data.arrays["y"]
    outputs = run(path, x)
    assert (outputs.dtype, outputs.shape) == (np.float32, (600, 10))
    accuracy = float((outputs.argmax(axis=1) == y).mean())
    if calibrated:
        assert (result.examples, result.accuracy) == (600, pytest.approx(accuracy, abs=2e-3))
        assert result.factored_accuracy is not None
        assert abs(result.factored_accuracy - accuracy) <= 0.01
    else:
        assert (result.examples, result.accuracy, result.factored_accuracy) == (0, None, None)
    assert accuracy >= 0.6


def test_float16_computes_in_float16_after_the_preprocessing(trained: Trained, tmp_path: Path) -> None:
    bundle, weights, _ = trained
    path = tmp_path / "model.onnx"
    fold(bundle, weights, path, precision="float16")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    halves = [types[node.output[0]] == TensorProto.FLOAT16 for node in graph.node]
    operators = [node.op_type for node in graph.node]
    assert operators[:4] == ["Cast", "Mul", "Add", "Cast"]
    assert operators[-1] == "Cast"
    assert halves == [False] * 3 + [True] * (len(halves) - 4) + [False]


def test_float16_of_sizes_and_constants_met_on_the_way() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "c"], ["scaled"]),
            helper.make_node("MatMul", ["scaled", "w"], ["product"]),
            helper.make_node("Shape", ["product"], ["size"]),
            helper.make_node("Expand", ["c", "size"], ["spread"]),
            helper.make_node("Cast", ["size"], ["sizes"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["sizes"], ["largest"], keepdims=0),
            helper.make_node("Sum", ["product", "spread", "largest", "scaled"], ["logits"]),
        ],
        "sizes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.float32(0.5), "c"), numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    halved = to_float16(model, {"w"})
    onnx.checker.check_model(halved, full_check=True)
    session = onnxruntime.InferenceSession(halved.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x + 0.5 + 4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("by_accuracy", [True, False])
def test_a_bad_conversion_is_refused(by_accuracy: bool, precision: Any, trained: Trained, tmp_path: Path) -> None:
    bundle, weights, data = trained

    def broken(model: onnx.ModelProto, *_: object) -> onnx.ModelProto:
        head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
        head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), "head.weight"))
        return model

    if by_accuracy:
        bound, message = np.inf, rf"expected {precision} to cost at most 2 points of accuracy, found \d"
    else:
        bound, message = (
            TOLERANCES[precision],
            r"expected the factored model's outputs within 0\.\d+ relative, found \d",
        )
    with (
        patch.dict(TOLERANCES, {precision: bound}),
        patch("export.folding.fold.to_float16", broken),
        patch("export.folding.quantization.to_int8", broken),
        pytest.raises(FedparaError, match=message) as e,
    ):
        fold(
            bundle,
            weights,
            tmp_path / "model.onnx",
            precision=precision,
            data=data if by_accuracy else None,
            max_drop=2,
        )
    assert e.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
