"""Laws of folding: the folded model computes what the PyTorch model computes, and no factor is left in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from norms import relative_error
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from zoo_training import NARROW

from device_runtime import Dataset, open_engine
from device_runtime.batches import epoch_batches
from export import export_bundle
from export.folding.composing import compose_layers
from export.folding.fold import TOLERANCES, fold
from export.folding.half import to_float16
from export.folding.ranges import Ranges
from export.forward.outputs import Chosen
from export.forward.preprocess import Argument, Deployed, Preprocessing
from fedpara_edge.demo import IMAGES
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.factors.compose import compose, factor_role, factor_shapes
from fedpara_edge.factors.layout import FACTORS, LayerSpec, Layout, TensorSpec
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.folded import INT8_OPTIONS, read_folded, stated_options
from fedpara_edge.formats.interface import ArraySpec
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.nn import ZOO, Conv2d, Linear

ENGINES = ("ort-training", "onnxruntime")
TOLERANCE = 1e-5


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


def assert_dense(path: Path, bundle: Bundle, tensors: dict[str, NDArray[Any]]) -> None:
    """The weight of every layer is there, composed, and its factors are not."""
    there = initializers(path)
    layout = bundle.manifest.layout
    assert not {tensor.name for tensor in layout.tensors if tensor.part in FACTORS} & there.keys()
    for layer in layout.layers:
        factors = {part: tensors[spec.name].astype(np.float64) for part, spec in layout.parts(layer).items()}
        expected = compose(layer, factors, np.tanh)
        turned = there.get(f"{layer.name}.weight.transposed")
        found = there[f"{layer.name}.weight"] if turned is None else turned.T
        assert found.size == expected.size, layer.name
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-6, atol=1e-12)


class Everything(nn.Module):
    """Every kind and form of layer, with dropout, normalization and a linear layer along sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            Conv2d(2, 8, 3, kind="dense"),
            Conv2d(8, 8, 3, padding=1, rank=3),
            nn.Dropout(0.3),
            nn.GroupNorm(2, 8),
            Conv2d(8, 8, 3, padding=1, rank=3, form="matrix", bias=False),
            Conv2d(8, 8, 3, stride=2, padding=1, rank=3, tanh=True),
            nn.ReLU(),
            Conv2d(8, 8, 3, padding=1, rank=3, kind="pfedpara"),
            Conv2d(8, 8, 1, rank=4, kind="lowrank"),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.MaxPool2d(2),
        )
        self.along = Linear(9, 6, rank=2)
        self.plain_along = nn.Linear(6, 6)
        self.linears = nn.Sequential(
            nn.Flatten(),
            Linear(48, 20, rank=4),
            nn.Dropout(0.5),
            Linear(20, 20, rank=3, tanh=True, bias=False),
            nn.ReLU(),
            Linear(20, 20, rank=3, kind="pfedpara"),
            Linear(20, 20, rank=5, kind="lowrank"),
            nn.Linear(20, 20, bias=False),
            nn.Linear(20, 5),
        )
        self.last = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs(x)
        return self.last(self.linears(self.plain_along(self.along(x.flatten(2))).relu()))


@pytest.mark.parametrize(
    ("engine", "contract"), [("ort-training", True), ("onnxruntime", True), ("onnxruntime", False)]
)
def test_every_kind_of_layer(engine: str, contract: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything()
    with patch("export.forward.contraction.step_cost", lambda *_, contracted: contracted != contract):
        bundle = quick_export(model, tmp_path / "bundle", (2, 20, 20), engine)
    path = tmp_path / "model.onnx"
    result = fold(bundle, initial_weights(bundle), path)
    factored = [layer.name for layer in bundle.manifest.layout.layers if layer.kind != "dense"]
    assert result.layers == tuple(factored)
    assert len(factored) == 10
    assert result.error <= TOLERANCE
    assert result.bytes == path.stat().st_size
    assert_plain(path)
    assert_dense(path, bundle, {name: value.numpy() for name, value in model.state_dict().items()})
    for batch in (1, 2, 7):
        x = np.random.default_rng(batch).standard_normal((batch, 2, 20, 20), np.float32)
        assert relative_error(run(path, x), model.eval()(torch.from_numpy(x)).detach().numpy()) <= TOLERANCE
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert (operators.count("Gemm"), operators.count("MatMul")) == (6, 2)


@pytest.mark.parametrize(
    ("name", "engine", "operators"),
    [
        ("mlp", "ort-training", {"Gemm": 2}),
        ("mlp", "onnxruntime", {"Gemm": 2}),
        ("cnn", "onnxruntime", {"Conv": 4, "Gemm": 1}),
        ("resnet18", "ort-training", {"Conv": 20, "Gemm": 1}),
        ("vgg16", "onnxruntime", {"Conv": 13, "Gemm": 3}),
    ],
)
def test_zoo(name: str, engine: str, operators: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    entry = ZOO[name]
    preprocessing: dict[str, Any] = {"mean": (0.4,), "std": (0.2,)}
    model = entry.factory(**NARROW.get(name, {}))
    bundle = quick_export(model, tmp_path / "bundle", entry.input_shape, engine, input_dtype="uint8", **preprocessing)
    path = tmp_path / "model.onnx"
    fold(bundle, initial_weights(bundle), path)
    assert_plain(path)
    assert_dense(path, bundle, {name: value.numpy() for name, value in model.state_dict().items()})
    x = np.random.default_rng(0).integers(0, 256, (3, *entry.input_shape)).astype(np.uint8)
    argument = Argument(None, Preprocessing("uint8", entry.input_shape, **preprocessing))
    deployed = Deployed(model, [argument], Chosen()).eval()
    assert relative_error(run(path, x), deployed(torch.from_numpy(x)).detach().numpy()) <= TOLERANCE
    found = [node.op_type for node in onnx.load(path).graph.node]
    assert {
        operator: found.count(operator) for operator in ("Conv", "Gemm", "MatMul") if operator in found
    } == operators
    assert not {"Shape", "Constant"} & set(found)


def test_folded_it_is_the_dense_model(tmp_path: Path) -> None:
    folded = []
    for kind in ("fedpara", "dense"):
        options: dict[str, Any] = {"kind": kind} if kind == "dense" else {"kind": kind, "rank": 3}
        model = nn.Sequential(
            Conv2d(2, 8, 3, **options), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), Linear(32, 5, **options)
        )
        bundle = quick_export(model, tmp_path / kind, (2, 10, 10), "onnxruntime")
        fold(bundle, initial_weights(bundle), tmp_path / f"{kind}.onnx")
        operators = [node.op_type for node in onnx.load(tmp_path / f"{kind}.onnx").graph.node]
        arrays = initializers(tmp_path / f"{kind}.onnx")
        folded.append((operators, {n: array.shape for n, array in arrays.items() if array.dtype == np.float32}))
    assert folded[0] == folded[1]


class Reused(nn.Module):
    """An embedding whose weight is also the head's, and a factored layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.inner = Linear(6, 6, rank=2)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.inner(self.embedding(x)).relu())
        return self.head(x.mean(dim=1))


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_and_reused_weights(engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reused()
    bundle = quick_export(model, tmp_path / "bundle", (4,), engine, input_dtype="int64", tokens=20)
    for precision, tolerance in (("float32", TOLERANCE), ("float16", 1e-2), ("int8", 0.1)):
        path = tmp_path / f"{precision}.onnx"
        fold(bundle, initial_weights(bundle), path, precision=precision)  # type: ignore[arg-type]
        x = np.random.default_rng(0).integers(0, 20, (5, 4))
        assert relative_error(run(path, x), model(torch.from_numpy(x)).detach().numpy()) <= tolerance
    shapes = {name: array.shape for name, array in initializers(tmp_path / "float32.onnx").items()}
    assert shapes["inner.weight.transposed"] == (6, 6)
    assert shapes["embedding.weight"] == (20, 6)


class Clashing(nn.Module):
    """Parameters and a buffer named like the inputs of a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(12))
        self.h = nn.Parameter(torch.randn(5, 12))
        self.register_buffer("mu", torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weights) @ self.h.T + self.mu


@pytest.mark.parametrize("engine", ENGINES)
def test_names_of_a_step_may_be_those_of_parameters(engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Clashing()
    bundle = quick_export(model, tmp_path / "bundle", (12,), engine)
    fold(bundle, initial_weights(bundle), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((4, 12), np.float32)
    assert relative_error(run(tmp_path / "model.onnx", x), model(torch.from_numpy(x)).detach().numpy()) <= TOLERANCE


def linear_layout(layer: LayerSpec) -> Layout:
    """One layer and its bias."""
    shapes = {**factor_shapes(layer), "bias": layer.shape[:1]}
    tensors = tuple(
        TensorSpec(
            name=f"{layer.name}.{part}",
            shape=shape,
            dtype="float32",
            layer=layer.name,
            part=part,  # type: ignore[arg-type]
            role=factor_role(layer, part),
        )
        for part, shape in shapes.items()
    )
    return Layout((layer,), tensors)


def contracted(layout: Layout, tensors: dict[str, NDArray[Any]], *, gemm: bool) -> onnx.ModelProto:
    """y = (x (Y1 ⊛ Y2)) (X1 ⊛ X2)ᵀ + b with ⊛ the Khatri-Rao product of rows, whose weight is nowhere."""
    (layer,) = layout.layers
    name, rank = layer.name, layer.rank
    constants = {"one": np.array([1]), "two": np.array([2]), "flat": np.array([-1, rank * rank])}
    constants |= {name: np.asarray(value) for name, value in tensors.items()}
    nodes = []
    for side, (a, b) in {"left": ("y1", "y2"), "right": ("x1", "x2")}.items():
        nodes += [
            helper.make_node("Unsqueeze", [f"{name}.{a}", "two"], [f"{side}.a"]),
            helper.make_node("Unsqueeze", [f"{name}.{b}", "one"], [f"{side}.b"]),
            helper.make_node("Mul", [f"{side}.a", f"{side}.b"], [f"{side}.product"]),
            helper.make_node("Reshape", [f"{side}.product", "flat"], [side]),
        ]
    nodes.append(helper.make_node("MatMul", ["x", "left"], ["inner"], name="first"))
    if gemm:
        nodes.append(helper.make_node("Gemm", ["inner", "right", f"{name}.bias"], ["logits"], name="second", transB=1))
    else:
        nodes.append(helper.make_node("Transpose", ["right"], ["turned"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["inner", "turned"], ["product"], name="second"))
        nodes.append(helper.make_node("Add", ["product", f"{name}.bias"], ["logits"], name="bias"))
    shape = ["batch", layer.shape[1]] if gemm else ["batch", 3, layer.shape[1]]
    graph = helper.make_graph(
        nodes,
        "contracted",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("gemm", [True, False])
def test_a_contracted_layer_becomes_one_product(gemm: bool) -> None:
    layer = LayerSpec(name="fc", operator="linear", kind="fedpara", form="matrix", shape=(7, 9), rank=3)
    layout = linear_layout(layer)
    random = np.random.default_rng(0)
    tensors = {spec.name: random.standard_normal(spec.shape, np.float32) for spec in layout.tensors}
    x = random.standard_normal((5, 9) if gemm else (5, 3, 9), np.float32)
    composed = compose_layers(contracted(layout, tensors, gemm=gemm), layout, {"x": x})
    assert composed.layers == ("fc",)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in composed.model.graph.initializer}
    weight = compose(layer, {part: tensors[f"fc.{part}"].astype(np.float64) for part in factor_shapes(layer)}, np.tanh)
    name, value = ("fc.weight", weight) if gemm else ("fc.weight.transposed", weight.T)
    assert arrays.keys() == {name, "fc.bias"} == composed.parameters
    np.testing.assert_allclose(arrays[name], value, rtol=1e-6)
    assert [node.op_type for node in composed.model.graph.node] == (["Gemm"] if gemm else ["MatMul", "Add"])
    session = onnxruntime.InferenceSession(composed.model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert relative_error(session.run(None, {"x": x})[0], x @ weight.T + tensors["fc.bias"]) <= TOLERANCE


def test_personal_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(12, 12, rank=3, kind="pfedpara"), nn.ReLU(), nn.Linear(12, 5))
    bundle = quick_export(model, tmp_path / "bundle", (12,), "onnxruntime")
    weights = initial_weights(bundle)
    personal = {name: 2 * value for name, value in bundle.read_initial_personal().items()}
    x = np.random.default_rng(0).standard_normal((4, 12), np.float32)
    fold(bundle, weights, tmp_path / "initial.onnx")
    fold(bundle, weights, tmp_path / "own.onnx", personal=personal)
    assert relative_error(run(tmp_path / "initial.onnx", x), model(torch.from_numpy(x)).detach().numpy()) <= TOLERANCE
    with torch.no_grad():
        model[0].x2.mul_(2)
        model[0].y2.mul_(2)
    assert relative_error(run(tmp_path / "own.onnx", x), model(torch.from_numpy(x)).detach().numpy()) <= TOLERANCE
    assert [read_folded(tmp_path / name)[0].personal for name in ("initial.onnx", "own.onnx")] == [False, True]


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


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of one small layer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small") / "bundle"
    return quick_export(nn.Sequential(Linear(12, 5, rank=2)), folder, (12,), "onnxruntime")


@pytest.fixture
def small(small_bundle: Bundle, tmp_path: Path) -> Iterator[tuple[Bundle, Weights]]:
    """The small bundle and its weights; whatever happens, nothing is written to `tmp_path`."""
    yield small_bundle, initial_weights(small_bundle)
    assert list(tmp_path.iterdir()) == []


Small = tuple[Bundle, Weights]


def scaled(weights: Weights, by: float) -> Weights:
    tensors = {name: np.asarray(by * value, np.float32) for name, value in weights.tensors.items()}
    return Weights(weights.fingerprint, weights.round, weights.layout, tensors)


def test_a_wrong_graph_is_refused(small: Small, tmp_path: Path) -> None:
    def moved(*arguments: Any) -> Any:
        composed = compose_layers(*arguments)
        (bias,) = [tensor for tensor in composed.model.graph.initializer if tensor.name.endswith("bias")]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.01, bias.name))
        return composed

    with (
        patch("export.folding.fold.compose_layers", moved),
        pytest.raises(
            FedparaError, match=r"factored model's outputs within 0.0001 relative, found 0\.\d+; nothing was"
        ),
    ):
        fold(*small, tmp_path / "model.onnx")


def test_a_float16_that_is_not_finite_is_refused(small: Small, tmp_path: Path) -> None:
    bundle, weights = small
    with (
        patch("export.folding.fold.find_ranges", lambda *_: Ranges()),
        pytest.raises(FedparaError, match="expected finite outputs in float16, found NaN or Inf; nothing was written"),
    ):
        fold(bundle, scaled(weights, 1e3), tmp_path / "model.onnx", precision="float16")


def test_diverged_weights_are_refused(small: Small, tmp_path: Path) -> None:
    bundle, weights = small
    with pytest.raises(FedparaError, match="expected finite outputs, found NaN or Inf: these weights diverged"):
        fold(bundle, scaled(weights, 1e15), tmp_path / "model.onnx")


def test_weights_of_another_bundle_are_refused(small: Small, tmp_path: Path) -> None:
    bundle, weights = small
    with pytest.raises(WrongBundleError, match=r"expected weights of bundle \w+…, found those of fff"):
        fold(bundle, Weights("f" * 64, 0, weights.layout, weights.tensors), tmp_path / "model.onnx")


@pytest.mark.parametrize("max_drop", [-1.0, 101.0, float("nan")])
def test_impossible_drop_is_refused(max_drop: float, small: Small, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_drop: expected points of accuracy from 0 to 100"):
        fold(*small, tmp_path / "model.onnx", max_drop=max_drop)


def test_existing_output_is_kept_unless_overwritten(small_bundle: Bundle, tmp_path: Path) -> None:
    path, weights = tmp_path / "model.onnx", initial_weights(small_bundle)
    path.write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        fold(small_bundle, weights, path)
    assert path.read_text() == "mine"
    first = fold(small_bundle, weights, path, overwrite=True)
    content = path.read_bytes()
    assert fold(small_bundle, weights, path, overwrite=True) == first
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_other_losses(loss: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = quick_export(nn.Sequential(Linear(12, 5, rank=2)), tmp_path / "bundle", (12,), "onnxruntime", loss=loss)
    random = np.random.default_rng(0)
    data = Dataset(
        path=tmp_path,
        arrays={
            "x": random.standard_normal((9, 12), np.float32),
            "y": random.integers(0, 2, (9, 5)).astype(np.float32),
        },
        interface=bundle.interface,
    )
    result = fold(bundle, initial_weights(bundle), tmp_path / "model.onnx", data=data)
    assert result.examples == 9
    assert (result.accuracy is None) == (loss == "mse")
    assert result.accuracy == result.factored_accuracy
    assert result.spec.interface.labels == (ArraySpec("y", (5,), "float32"),)
