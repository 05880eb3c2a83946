"""Laws of folding: the folded model computes what the PyTorch model computes, and no factor is left in it."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from folded import assert_plain, initial_weights, initializers, quick_export, run
from norms import relative_error
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from zoo_training import NARROW

from device_runtime import Dataset
from export.folding.composing import compose_layers
from export.folding.fold import fold
from export.forward.outputs import Chosen
from export.forward.preprocess import Argument, Deployed, Preprocessing
from fedpara_edge.factors.compose import compose, factor_role, factor_shapes
from fedpara_edge.factors.layout import FACTORS, LayerSpec, Layout, TensorSpec
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.folded import read_folded
from fedpara_edge.formats.interface import ArraySpec
from fedpara_edge.nn import ZOO, Conv2d, Linear

ENGINES = ("ort-training", "onnxruntime")
TOLERANCE = 1e-5


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


@pytest.mark.slow
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


@pytest.mark.slow
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
