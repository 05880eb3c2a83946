"""Laws of frozen layers: they stay as they are, nothing of them is sent, and no gradient is computed down there."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
from norms import relative_error
from onnx import numpy_helper
from torch import nn

from device_runtime import open_engine
from export import export_bundle, make_bundle
from export.folding.fold import fold
from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import compose
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.roles import keep_personal
from fedpara_edge.formats.bundle import ENGINES, WEIGHTS, Bundle
from fedpara_edge.formats.folded import Precision
from fedpara_edge.formats.recipe import ExportConfig, Recipe
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.nn import convert, fit_factors, layout_of
from fedpara_edge.simulation.plan.plan import read_plan

IMAGE = (2, 12, 12)
GRAPHS = {"ort-training": "training_model.onnx", "onnxruntime": "train_step.onnx"}


def images() -> nn.Sequential:
    """Convolutions, every normalization, pooling and dropout below a head of two layers."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1)
    )
    norms = nn.Sequential(nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.LayerNorm(16 * 36), nn.Dropout(0.1))
    head = nn.Sequential(nn.Linear(16 * 36, 24), nn.ReLU(), nn.Linear(24, 3))
    model = nn.Sequential(body, norms, head)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.startswith("0.1.running"):
                tensor.uniform_(0.5, 2)
    return model


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def export(model: nn.Module, folder: Path, shape: tuple[int, ...] = IMAGE, **options: Any) -> Bundle:
    return export_bundle(model, folder, ExportConfig(name="test", input_shape=shape, **options))[0]


def quick_export(model: nn.Module, folder: Path, shape: tuple[int, ...] = IMAGE, **options: Any) -> Bundle:
    with patch("export.exporter.verify", return_value={}):
        return export(model, folder, shape, **options)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Bundle]:
    """The model with frozen convolutions and norms, and its bundle, verified in both engines."""
    model, _ = convert(images(), Factorization(gamma=0.5, freeze=("0", "1")), pretrained=True)
    return model, export(model, tmp_path_factory.mktemp("frozen") / "bundle")


def test_patterns_are_of_parameters_or_modules() -> None:
    def left(*patterns: str) -> set[str]:
        return trained(convert(images(), Factorization(kind="dense", freeze=patterns, batchnorm="freeze"))[0])

    every = left()
    head = {f"2.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert left("0", "1") == left("0.*", "1.*") == left("[01]") == head
    assert left("2") == every - head
    assert left("*.bias", "0.4.weight") == {name for name in every if name.endswith("weight")} - {"0.4.weight"}


def test_the_given_model_is_not_touched() -> None:
    model = images()
    convert(model, Factorization(freeze=("0", "1")))
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (
            ("0", "head"),
            "freeze: expected patterns of parameters or modules of the model, found 'head', .* matches none",
        ),
        (("*",), "freeze: expected a parameter left to train, found all frozen; freeze fewer of them"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(patterns: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        convert(images(), Factorization(freeze=patterns))


def test_statistics_of_a_batchnorm_are_frozen_with_it() -> None:
    convert(images(), Factorization(freeze=("0",)))
    for patterns in (("0.1.weight",), ("0.0", "0.4"), ("2",)):
        with pytest.raises(InputError, match=r"module '0.1': BatchNorm2d keeps running statistics"):
            convert(images(), Factorization(freeze=patterns))
    bare = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3))
    convert(bare, Factorization(freeze=("0",)))


@pytest.mark.slow
def test_frozen_layers_stay_dense_unless_they_have_a_rank_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.LSTM(40, 40), nn.Linear(40, 40))
    converted, report = convert(model, Factorization(gamma=0, freeze=("0", "1.weight_hh_l0"), rank_of={"*": 8}))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons == {
        "0": "frozen (requires_grad=False)",
        "1.weight_ih_l0": "",
        "1.weight_hh_l0": "frozen (requires_grad=False)",
        "2": "",
    }
    own = Factorization(gamma=0, freeze=("0", "1.weight_hh_l0"), rank_of={"0": 8, "1.*": 7})
    converted, report = convert(model, own, pretrained=True)
    assert [layer.spec.rank for layer in report.layers if layer.spec] == [8, 7, 7, 7]
    roles = {tensor.name: tensor.role for tensor in layout_of(converted).tensors}
    assert {roles[f"0.{part}"] for part in ("x1", "y1", "x2", "y2", "bias")} == {"frozen"}
    assert {roles[f"1.weight_hh_l0.{part}"] for part in ("x1", "y1", "x2", "y2")} == {"frozen"}
    assert {roles[name] for name in ("1.weight_ih_l0.x1", "1.bias_hh_l0", "2.x1")} == {"shared"}


def test_no_personal_factors_of_a_frozen_layer() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    converted, _ = convert(model, Factorization(kind="pfedpara", freeze=("0",), rank_of={"0": 8}))
    layout = layout_of(converted)
    assert {tensor.name for tensor in layout.with_role("personal")} == {"1.x2", "1.y2"}
    assert layout.frozen_parameters == 4 * 40 * 8 + 40


def test_frozen_and_personal() -> None:
    converted, _ = convert(images(), Factorization(freeze=("0", "1", "2.0.bias")))
    layout = layout_of(converted)
    personal = keep_personal(layout, ["2.0"]).with_role("personal")
    assert personal
    assert "2.0.bias" not in {tensor.name for tensor in personal}
    with pytest.raises(InputError, match=r"personal: .* found '0', which matches frozen ones only, which never travel"):
        keep_personal(layout, ["0"])


@pytest.mark.slow
def test_only_what_is_trained_is_in_files_and_counts(frozen: tuple[nn.Module, Bundle]) -> None:
    model, bundle = frozen
    layout = bundle.manifest.layout
    assert {tensor.name for tensor in layout.shared} == trained(model)
    assert read_weights(bundle.file(WEIGHTS)).tensors.keys() == trained(model)
    whole = images()
    kept = ("0.0.weight", "0.0.bias", "0.4.weight", "0.4.bias", "1.0.weight", "1.0.bias", "1.3.weight", "1.3.bias")
    assert layout.frozen_parameters == sum(whole.get_parameter(name).numel() for name in kept)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_train_the_head_as_torch_does(engine: str, frozen: tuple[nn.Module, Bundle]) -> None:
    source, bundle = frozen
    model = copy.deepcopy(source).eval()
    opened = open_engine(bundle, engine, threads=1)
    random = np.random.default_rng(0)
    x, y = random.standard_normal((4, *IMAGE), np.float32), np.array([0, 1, 2, 0])
    outcome = opened.evaluate(x, y)
    expected = model(torch.from_numpy(x))
    assert relative_error(outcome.outputs["logits"], expected.detach().numpy()) < 1e-5
    assert outcome.loss == pytest.approx(nn.functional.cross_entropy(expected, torch.from_numpy(y)).item(), rel=1e-5)
    before = opened.read()
    for _ in range(3):
        opened.step(x, y, learning_rate=0.1, seed=0)
    assert opened.read().keys() == before.keys() == trained(model)
    assert opened.evaluate(x, y).loss < outcome.loss


def activations_read(model: onnx.ModelProto) -> set[str]:
    """Activations that nothing trained can change, which an operator reads that something trained can."""
    fixed, activations, read = {"seed", *(tensor.name for tensor in model.graph.initializer)}, {"x"}, set()
    for node in model.graph.node:
        inputs = {name for name in node.input if name}
        if inputs <= fixed | activations:
            is_shape = node.op_type in ("Shape", "Size") or inputs <= fixed
            (fixed if is_shape else activations).update(node.output)
        else:
            read |= inputs & activations
    return read


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_stops_at_the_lowest_trained_layer(
    engine: str, frozen: tuple[nn.Module, Bundle], tmp_path: Path
) -> None:
    """All that training needs of the frozen part is its output, so no other activation is kept."""
    model = onnx.load(frozen[1].file(GRAPHS[engine]))
    counts = Counter(node.op_type for node in model.graph.node)
    assert (counts["Conv"], counts["MaxPool"]) == (2, 1)
    assert not {"ConvGrad", "ConvTranspose", "MaxPoolGrad", "LayerNormalizationGrad"} & counts.keys()
    assert len(activations_read(model)) == 1
    whole, _ = convert(images(), Factorization(gamma=0.5, freeze=("0.0", "0.1")), pretrained=True)
    bundle = quick_export(whole, tmp_path / "bundle", engines=(engine,))
    counts = Counter(node.op_type for node in onnx.load(bundle.file(GRAPHS[engine])).graph.node)
    assert counts["Conv"] + counts["ConvGrad"] == 3


@pytest.mark.slow
def test_a_frozen_recurrence_keeps_its_operator(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 24, batch_first=True), nn.Linear(24, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
            return outputs

    torch.manual_seed(0)
    for patterns, operators in ((("lstm",), {"LSTM"}), ((), {"Scan"})):
        model, _ = convert(Recurrent(), Factorization(kind="dense", freeze=patterns))
        bundle = export(model, tmp_path / str(len(patterns)), (5, 6), engines=("onnxruntime",))
        found = {node.op_type for node in onnx.load(bundle.file("train_step.onnx")).graph.node}
        assert found & {"LSTM", "Scan"} == operators


def test_a_frozen_factored_layer_is_composed_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    own = Factorization(freeze=("0",), rank_of={"0": 8})
    converted, _ = convert(model, own, pretrained=True)
    bundle = export(converted, tmp_path / "bundle", (40,), engines=("onnxruntime",))
    constants = [numpy_helper.to_array(t) for t in onnx.load(bundle.file("train_step.onnx")).graph.initializer]
    spec = converted[0].spec
    expected = compose(spec, fit_factors(spec, model[0].weight).factors, torch.tanh).numpy()
    dense = [value for value in constants if value.shape == (40, 40)]
    assert len(dense) == 1
    assert min(relative_error(dense[0], expected), relative_error(dense[0].T, expected)) < 1e-5
    assert not [value for value in constants if value.shape == (40, 8)]


@pytest.mark.slow
def test_the_fingerprint_covers_frozen_weights(tmp_path: Path) -> None:
    def fingerprint(name: str, change: str = "") -> str:
        model, _ = convert(images(), Factorization(freeze=("0", "1")))
        if change:
            with torch.no_grad():
                model.state_dict()[change].flatten()[0] += 1e-3
        torch.manual_seed(1)
        return quick_export(model, tmp_path / name, engines=("onnxruntime",)).manifest.fingerprint

    first = fingerprint("first")
    assert fingerprint("same") == first
    assert fingerprint("other layer", "0.0.weight") != first
    assert fingerprint("other statistics", "0.1.shift") != first
    assert fingerprint("other head", "2.2.bias") == first


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_frozen_layers_are_folded(precision: Precision, frozen: tuple[nn.Module, Bundle], tmp_path: Path) -> None:
    _, bundle = frozen
    folding = fold(bundle, read_weights(bundle.file(WEIGHTS)), tmp_path / "model.onnx", precision=precision)
    assert folding.error < {"float32": 1e-5, "float16": 0.01, "int8": 0.2}[precision]
    assert folding.layers == ("2.0",)


def test_a_plan_may_freeze(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "plans" / "mnist-personal.toml").read_text(encoding="utf-8")
    (tmp_path / "plan.toml").write_text(
        text.replace("[model]", '[model]\npretrained = "w.pt"\nnew_head = ["head"]\nfreeze = ["hidden"]'),
        encoding="utf-8",
    )
    arm = read_plan(tmp_path / "plan.toml").arms[0]
    assert (arm.model.freeze, arm.model.new_head) == (("hidden",), ("head",))
    assert arm.model.pretrained == tmp_path / "w.pt"


def test_a_recipe_freezes(tmp_path: Path) -> None:
    recipe = Recipe(name="mlp", kind="dense", freeze=("hidden",), engines=("onnxruntime",))
    made = make_bundle(recipe, tmp_path / "bundle")
    assert {tensor.name for tensor in made.bundle.manifest.layout.shared} == {"head.weight", "head.bias"}
    assert made.report.parameters_after == 2570
