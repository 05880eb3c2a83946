"""Laws of the export: what is written trains what the PyTorch model trains, or nothing is written."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from norms import norm
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from device_runtime.engines.registry import open_engine
from export import export_bundle, exporter, make_bundle
from export.comparison import TOLERANCE
from export.forward.preprocess import Preprocessing
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.bundle import (
    ENGINES,
    INITIAL_PERSONAL,
    ONNXRUNTIME_FILES,
    ORT_TRAINING_FILES,
    WEIGHTS,
    open_bundle,
)
from fedpara_edge.formats.recipe import ExportConfig, Recipe
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.nn import ZOO, Conv2d, Linear, convert


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + F.gelu(self.inner(x), approximate="tanh")
        return self.head(torch.cat([h, F.leaky_relu(x)], dim=1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x).mean(dim=1))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Linear(12, 12, rank=2)
        self.second = self.first
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(12))
        self.linear = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=1, keepdim=True)
        return self.linear(x - mean * self.mean)


def image_net(*layers: nn.Module) -> nn.Sequential:
    """A network on 1x12x12 images around some layers, its head sized by a trial run."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(2, 1, 12, 12))
    return net


def vector_net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), *layers, nn.Linear(16, 5))


IMAGE, VECTOR = (1, 12, 12), (12,)
MODELS = {
    "factored": (lambda: nn.Sequential(nn.Flatten(), Linear(144, 32, rank=6), nn.ReLU(), Linear(32, 5, rank=2)), IMAGE),
    "conv tensor": (lambda: image_net(Conv2d(8, 16, 3, rank=4, stride=2, padding=1), nn.ReLU()), IMAGE),
    "conv matrix": (lambda: image_net(Conv2d(8, 16, 3, rank=4, form="matrix", dilation=2), nn.ReLU()), IMAGE),
    "tanh": (lambda: image_net(Conv2d(8, 16, 3, rank=4, tanh=True), nn.ReLU()), IMAGE),
    "pfedpara": (lambda: vector_net(nn.ReLU(), Linear(16, 16, rank=4, kind="pfedpara")), VECTOR),
    "lowrank": (lambda: image_net(Conv2d(8, 16, 3, rank=4, kind="lowrank"), nn.ReLU()), IMAGE),
    "group norm": (lambda: image_net(nn.GroupNorm(4, 8), nn.SiLU(), nn.GroupNorm(8, 8, affine=False)), IMAGE),
    "layer norm": (lambda: vector_net(nn.LayerNorm(16), nn.GELU(), nn.LayerNorm(16, elementwise_affine=False)), VECTOR),
    "max pool": (lambda: image_net(nn.ReLU(), nn.MaxPool2d(3, 2, padding=1), nn.Tanh()), IMAGE),
    "average pool": (lambda: image_net(nn.AvgPool2d(2), nn.Sigmoid()), IMAGE),
    "average pool with overlap": (lambda: image_net(nn.AvgPool2d(3, 2, 1), nn.Tanh()), IMAGE),
    "average pool, ceil": (
        lambda: image_net(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.Tanh()),
        IMAGE,
    ),
    "adaptive pool": (lambda: image_net(nn.AdaptiveAvgPool2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(1)), IMAGE),
    "adaptive pool without tiles": (lambda: image_net(nn.AdaptiveAvgPool2d((5, 7)), nn.Tanh()), IMAGE),
    "instance norm": (lambda: image_net(nn.InstanceNorm2d(8, affine=True), nn.Tanh()), IMAGE),
    "more activations": (lambda: vector_net(nn.SELU(), nn.CELU(0.7), nn.GELU()), VECTOR),
    "tied weights": (Tied, (4,)),
    "names that the graph uses": (Named, VECTOR),
    "shared module": (Shared, VECTOR),
    "dropout": (lambda: vector_net(nn.Dropout(0.3), nn.ReLU(), nn.Dropout(0.5)), VECTOR),
    "activations": (
        lambda: vector_net(nn.Hardswish(), nn.Mish(), nn.Softplus(beta=2), nn.ELU(1.5), nn.ReLU6(), nn.Hardsigmoid()),
        VECTOR,
    ),
    "residual and concat": (Residual, VECTOR),
    "attention": (Attention, (7, 8)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(24, 5)), (4,)),
}


def options(shape: tuple[int, ...], **more: object) -> ExportConfig:
    chosen = {"name": "test", "input_shape": shape, "input_dtype": "float32", "engines": ENGINES}
    return ExportConfig(**{**chosen, **more})


def worst(verification: dict) -> float:
    assert set(verification) == set(ENGINES)
    return max(errors.worst for errors in verification.values())


@pytest.mark.parametrize("name", MODELS)
def test_both_engines_agree_with_torch(name: str, tmp_path: Path) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(3)
    tokens = {"input_dtype": "int64", "tokens": 20} if shape == (4,) else {}
    bundle, verification = export_bundle(make(), tmp_path / "bundle", options(shape, **tokens))
    assert worst(verification) <= TOLERANCE
    assert {*ORT_TRAINING_FILES, *ONNXRUNTIME_FILES, WEIGHTS} <= bundle.manifest.files.keys()


@pytest.mark.parametrize(
    ("loss", "optimizer", "constants"),
    [("mse", "sgd", {}), ("bce", "adamw", {}), ("cross_entropy", "adamw", {}), ("mse", "sgd", {"momentum": 0.9})],
)
def test_losses_and_optimizers(loss: str, optimizer: str, constants: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    chosen = options(VECTOR, loss=loss, optimizer=optimizer, **constants)
    bundle, verification = export_bundle(vector_net(nn.ReLU()), tmp_path / "bundle", chosen)
    assert worst(verification) <= TOLERANCE
    (label,) = bundle.interface.labels
    assert ("optimizer_model.onnx" in bundle.manifest.files) == (not constants.get("momentum"))
    assert (label.dtype, label.shape) == (("int64", ()) if loss == "cross_entropy" else ("float32", (5,)))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet18"])
def test_zoo_with_preprocessing(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    entry = ZOO[model]
    channels = entry.input_shape[0]
    chosen = options(entry.input_shape, input_dtype="uint8", mean=(0.4,) * channels, std=(0.2,) * channels)
    bundle, verification = export_bundle(entry.factory(), tmp_path / "bundle", chosen)
    assert worst(verification) <= TOLERANCE
    graph = onnx.load(bundle.file("training_model.onnx"))
    assert graph.ir_version == 10
    inputs = {value.name: value for value in graph.graph.input}
    assert inputs["x"].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    factors = {tensor.name for tensor in bundle.manifest.layout.shared if tensor.part in {"t1", "x1", "y1"}}
    assert factors
    assert factors <= inputs.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shape"), [("char-lstm", (12,)), ("har-transformer", (20, 6))])
def test_zoo_of_sequences(model: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    entry = ZOO[model]
    more = {"tokens": entry.classes} if entry.input_dtype == "int64" else {"mean": (0.4,) * 6, "std": (2.0,) * 6}
    chosen = options(shape, input_dtype=entry.input_dtype, **more)
    bundle, verification = export_bundle(entry.factory(input_shape=shape), tmp_path / "bundle", chosen)
    assert worst(verification) <= TOLERANCE
    (label,) = bundle.interface.labels
    assert (label.shape, label.classes) == (((12,), 80) if model == "char-lstm" else ((), 5))


def test_channels_are_the_first_dimension_or_else_the_last() -> None:
    mean, std = [1.0, 2.0, 3.0], [0.5, 2.0, 4.0]
    for shape, by_channel in (((3, 8, 8), (3, 1, 1)), ((8, 3), (1, 3)), ((3, 3), (3, 1)), ((3,), (3,))):
        x = torch.randn(2, *shape)
        expected = (x - torch.tensor(mean).reshape(by_channel)) / torch.tensor(std).reshape(by_channel)
        found = Preprocessing("float32", shape, mean=mean, std=std)(x, torch.float32)
        torch.testing.assert_close(found, expected)
    for shape in ((8, 3, 8), (8, 4)):
        with pytest.raises(InputError, match=rf"mean: expected 1 number or 8, one for each channel of \({shape[0]}, "):
            Preprocessing("float32", shape, mean=mean, std=std)
    with pytest.raises(InputError, match=r"std: expected 1 number or 8, .* found 3"):
        Preprocessing("float32", (8, 3), mean=[0.0] * 8, std=std)


def test_no_path_of_the_machine_is_in_the_graphs(tmp_path: Path) -> None:
    bundle, _ = export_bundle(vector_net(nn.ReLU()), tmp_path / "bundle", options(VECTOR))
    for name in (*ORT_TRAINING_FILES, *ONNXRUNTIME_FILES):
        content = bundle.file(name).read_bytes()
        assert b"site-packages" not in content
        assert b"test_export" not in content
        assert str(Path.home()).encode() not in content


@pytest.mark.slow
def test_same_model_same_fingerprint_other_graph_other_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fingerprints = []
    for index, activation in enumerate((nn.ReLU(), nn.ReLU(), nn.Tanh())):
        bundle, _ = export_bundle(vector_net(activation), tmp_path / str(index), options(VECTOR))
        fingerprints.append(bundle.manifest.fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_weights_and_personal_tensors_are_those_of_the_model(tmp_path: Path) -> None:
    model, _ = convert(
        nn.Sequential(nn.Linear(12, 64), nn.Linear(64, 5)), Factorization(kind="pfedpara", include=("0",), gamma=0.0)
    )
    bundle, _ = export_bundle(model, tmp_path / "bundle", options(VECTOR))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    shared = read_weights(bundle.file(WEIGHTS)).tensors
    local = bundle.read_initial_personal()
    assert local.keys() == {"0.x2", "0.y2"}
    assert shared.keys() == state.keys() - local.keys()
    for name, tensor in {**shared, **local}.items():
        np.testing.assert_array_equal(tensor, state[name])
    assert INITIAL_PERSONAL in bundle.manifest.files


@pytest.mark.slow
def test_initial_weights_can_be_small(tmp_path: Path) -> None:
    exact, small = (
        make_bundle(Recipe(name="mlp", initial_codec=codec, engines=("onnxruntime",)), tmp_path / codec).bundle
        for codec in ("float32", "int4")
    )
    sizes = [bundle.file(WEIGHTS).stat().st_size for bundle in (exact, small)]
    assert 5 * sizes[1] < sizes[0]
    assert small.manifest.fingerprint == exact.manifest.fingerprint
    start = read_weights(small.file(WEIGHTS))
    for name, tensor in read_weights(exact.file(WEIGHTS)).tensors.items():
        assert norm(start.tensors[name] - tensor) <= 0.2 * norm(tensor)
    images, labels = np.zeros((8, 1, 28, 28), np.uint8), np.arange(8)
    engine = open_engine(small, "onnxruntime", threads=1)
    engine.load(start.tensors)
    assert np.isfinite(engine.step(images, labels, learning_rate=0.1, seed=0))
    with pytest.raises(InputError, match=r"initial_codec: topk: expected every tensor within 0.5 of its norm, found"):
        make_bundle(Recipe(name="mlp", initial_codec="topk", engines=("onnxruntime",)), tmp_path / "zero")
    assert not (tmp_path / "zero").exists()
    with pytest.raises(InputError, match="initial_codec: expected one of float32, "):
        Recipe(name="mlp", initial_codec="int5")


def test_frozen_parameters_stay_in_the_graph(tmp_path: Path) -> None:
    model = vector_net(nn.ReLU())
    model[0].weight.requires_grad_(False)
    bundle, _ = export_bundle(model, tmp_path / "bundle", options(VECTOR))
    assert [tensor.name for tensor in bundle.manifest.layout.with_role("frozen")] == ["0.weight"]
    assert "0.weight" not in {tensor.name for tensor in bundle.manifest.layout.shared}


class NamedLikeTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.x


class Sampled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.grid_sample(x, x[:, :2].movedim(1, -1), align_corners=False)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(12, 5), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class TwoOutputs(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Nearest(nn.Module):
    """The nearest of some vectors, with the gradient of what it stands for: none by the vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.vectors = nn.Linear(12, 5), nn.Parameter(torch.randn(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        nearest = self.vectors[(y.unsqueeze(1) - self.vectors).square().sum(-1).argmin(1)]
        return y + (nearest - y).detach()


class Projected(nn.LSTM):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x.unsqueeze(1))[0].squeeze(1)


BAD = {
    "no gradient in torch": (Nearest, VECTOR, {}, r"parameter 'vectors': expected a gradient .* --freeze 'vectors'"),
    "projected LSTM": (
        lambda: nn.Sequential(Projected(12, 16, proj_size=5, batch_first=True)),
        VECTOR,
        {},
        r"module '0': expected an LSTM without projection, .* found proj_size=5",
    ),
    "no gradient": (lambda: image_net(Sampled()), IMAGE, {}, r"module '1': .* found GridSample, which has none"),
    "name of the input": (NamedLikeTheInput, VECTOR, {}, r"parameter 'x': expected a name that the graph does not use"),
    "batch norm": (
        lambda: image_net(nn.BatchNorm2d(8)),
        IMAGE,
        {},
        r"module '1': expected no BatchNorm but what .* --batchnorm",
    ),
    "wrong input shape": (lambda: vector_net(nn.ReLU()), (13,), {}, r"expected to take .*\[4, 13\]"),
    "outputs for classes": (
        lambda: nn.Sequential(nn.Linear(12, 1), nn.Flatten(0)),
        VECTOR,
        {},
        r"expected outputs \[batch, classes\]",
    ),
    "two outputs": (
        lambda: TwoOutputs(12, 5),
        VECTOR,
        {},
        r"expected one output of floating numbers, found output_0, output_1; choose",
    ),
    "unused parameter": (Unused, VECTOR, {}, r"parameter 'spare.weight'"),
    "nothing to train": (lambda: nn.Sequential(nn.Flatten()), IMAGE, {}, r"expected trainable parameters"),
    "mean by channel": (lambda: image_net(), IMAGE, {"mean": (0.1, 0.2, 0.3)}, r"mean: expected 1 number"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_trained_is_named_and_nothing_written(name: str, tmp_path: Path) -> None:
    make, shape, more, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        export_bundle(make(), tmp_path / "bundle", options(shape, **more))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _another_activation(path: Path) -> None:
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "Tanh"
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("writer", "name"),
    [("export.artifacts.write_artifacts", "training_model.onnx"), ("export.exporter.write_steps", "train_step.onnx")],
)
def test_a_wrong_graph_fails_the_verification(
    writer: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, function = writer.rpartition(".")
    write = getattr(importlib.import_module(module), function)

    def sabotaged(graph: object, folder: Path, *rest: object, **more: object) -> None:
        write(graph, folder, *rest, **more)
        _another_activation(folder / name)

    monkeypatch.setattr(writer, sabotaged)
    with pytest.raises(FedparaError, match=r"expected torch's result within 1e-05 .* on batch 1 of 1 row;"):
        export_bundle(vector_net(nn.ReLU()), tmp_path / "bundle", options(VECTOR))
    assert list(tmp_path.iterdir()) == []


def test_a_folded_factor_fails_the_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_graph = exporter.forward_graph

    def folding(model: object, example: torch.Tensor, **options: object) -> object:
        graph = make_graph(model, example, **options)
        composed = next(node for node in graph.model.graph.node if node.op_type == "MatMul")
        constant = numpy_helper.from_array(np.zeros((16, 12), np.float32), composed.output[0])
        graph.model.graph.node.remove(composed)
        graph.model.graph.initializer.append(constant)
        return graph

    monkeypatch.setattr(exporter, "forward_graph", folding)
    model = nn.Sequential(Linear(12, 16, rank=2), nn.ReLU(), nn.Linear(16, 5))
    with pytest.raises(InputError, match=r"parameter '0\.[xy]1': .* folded away"):
        export_bundle(model, tmp_path / "bundle", options(VECTOR))
    assert list(tmp_path.iterdir()) == []


def test_dropout_keeps_its_ratio(tmp_path: Path) -> None:
    bundle, _ = export_bundle(vector_net(nn.Dropout(0.3), nn.Dropout(0.5)), tmp_path / "bundle", options(VECTOR))
    graph = onnx.load(bundle.file("training_model.onnx")).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ratios = [float(constants[node.input[1]]) for node in graph.node if node.op_type == "Dropout"]
    assert ratios == [pytest.approx(0.3), pytest.approx(0.5)]


def test_only_bundles_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(InputError, match="expected a bundle to replace"):
        export_bundle(vector_net(nn.ReLU()), tmp_path / "thesis", options(VECTOR), overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_the_users_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = vector_net(nn.Dropout(0.3)).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_bundle(model, tmp_path / "bundle", options(VECTOR))
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vgg16_agrees_whatever_the_seed(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    entry = ZOO["vgg16"]
    chosen = options(entry.input_shape, input_dtype="uint8", seed=seed)
    _, verification = export_bundle(entry.factory(), tmp_path / "bundle", chosen)
    rounding = max(errors.rounding for errors in verification.values())
    assert rounding <= 1e-4  # no rectifier on the other side, which makes 1e-3 or more
    assert all(errors.worst <= errors.limit for errors in verification.values())


def test_existing_bundle_is_kept_unless_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    first, _ = export_bundle(vector_net(nn.ReLU()), folder, options(VECTOR))
    with pytest.raises(InputError, match="--overwrite"):
        export_bundle(vector_net(nn.Tanh()), folder, options(VECTOR))
    assert open_bundle(folder).manifest.fingerprint == first.manifest.fingerprint
    second, _ = export_bundle(vector_net(nn.Tanh()), folder, options(VECTOR), overwrite=True)
    assert json.loads((folder / "manifest.json").read_text())["fingerprint"] == second.manifest.fingerprint
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_an_engine_that_can_not_be_exported_for_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "export.artifacts", None)
    with pytest.raises(InputError, match="engines: expected onnxruntime-training-cpu to be installed") as refused:
        export_bundle(vector_net(nn.ReLU()), tmp_path / "bundle", options(VECTOR))
    assert refused.value.key == "engines"
    assert not (tmp_path / "bundle").exists()
    bundle, _ = export_bundle(vector_net(nn.ReLU()), tmp_path / "bundle", options(VECTOR, engines=("onnxruntime",)))
    assert bundle.manifest.engines == ("onnxruntime",)
