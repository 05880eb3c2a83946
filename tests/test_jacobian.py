"""The Jacobian correction in the exported step is what torch differentiates twice for, and none comes by surprise."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command
from norms import relative_error
from numpy.typing import NDArray
from small_net import OPTIMIZERS, OPTIONS, torch_optimizer, without_verification
from step_models import IMAGE, VECTOR, batch, net, run_step, weights_of
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from device_runtime import Adjustment, open_engine
from export import export_bundle
from export.forward.contraction import contract_layers
from export.step import training_step
from export.step.weight_update import optimizer_constants
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.formats.bundle import ENGINES, Bundle, open_bundle
from fedpara_edge.formats.recipe import ExportConfig, Recipe
from fedpara_edge.nn import GRU, LSTM, Conv2d, FactoredLayer, Linear

TOLERANCE = 1e-5
LAMBDA, RATE = 3.0, 0.5
RATES = {"sgd": 0.3, "momentum": 0.05, "adamw": 0.02}
SEQUENCE = (7, 4)
VARIANTS: list[dict[str, Any]] = [{}, {"tanh": True}, {"kind": "pfedpara"}, {"kind": "lowrank"}]
Tensors = dict[str, torch.Tensor]


class Twice(nn.Module):
    """One layer in two places, so that its weight is composed twice, and once more where it gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = Linear(12, 12, rank=3), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.layer.weight.detach().sum()
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Recurrent(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent, self.last = recurrent, nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.recurrent(x)[0].mean(1))


def linears() -> nn.Module:
    layers = [Linear(12, 12, rank=3, **variant) for variant in VARIANTS]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())), nn.Linear(12, 5))


def convolutions(form: Any) -> nn.Module:
    layers = [Conv2d(i, i + 1, 3, rank=2, form=form, **v) for i, v in zip((2, 3, 4, 5), VARIANTS, strict=True)]
    return net(*(part for layer in layers for part in (layer, nn.Tanh())))


def mixed() -> nn.Module:
    """Strides, dense layers, a norm, a frozen factor and a frozen layer, and names that the graph has for itself."""
    parts: dict[str, nn.Module] = {
        "new_first": Conv2d(2, 12, 3, rank=3, stride=2, padding=1, kind="pfedpara"),
        "norm": nn.GroupNorm(2, 12),
        "tanh": nn.Tanh(),
        "dense": nn.Conv2d(12, 6, 3),
        "second": Conv2d(6, 6, (1, 3), rank=3),
        "third": Conv2d(6, 6, 1, rank=3),
        "flat": nn.Flatten(),
        "last": Linear(48, 5, rank=2),
    }
    parts["second"].x2.requires_grad_(False)
    parts["third"].requires_grad_(False)
    return nn.Sequential(OrderedDict(parts))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (linears, VECTOR),
    "tensor form": (lambda: convolutions("tensor"), IMAGE),
    "matrix form": (lambda: convolutions("matrix"), IMAGE),
    "mixed": (mixed, IMAGE),
    "used twice": (Twice, VECTOR),
    "lstm": (lambda: Recurrent(LSTM(4, 12, rank=2, batch_first=True)), SEQUENCE),
    "gru": (lambda: Recurrent(GRU(4, 6, rank=2, tanh=True, batch_first=True, bidirectional=True)), SEQUENCE),
}
every_model = pytest.mark.parametrize("name", MODELS)


def composed(spec: LayerSpec, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Propositions 1 and 3, and section 2.3, as they are printed."""
    branches = []
    for index in "1" if spec.kind == "lowrank" else "12":
        x, y = factors[f"x{index}"], factors[f"y{index}"]
        if spec.form == "matrix":
            branches.append(torch.einsum("or,nr->on", x, y).reshape(spec.shape))
        else:
            branches.append(torch.einsum("rskl,or,is->oikl", factors[f"t{index}"], x, y))
    if spec.tanh:
        branches = [torch.tanh(branch) for branch in branches]
    return branches[0] if spec.kind == "lowrank" else branches[0] * (branches[1] + (spec.kind == "pfedpara"))


def dense_twin(model: nn.Module) -> nn.Module:
    """The model with torch's layers in place of factored ones."""

    def twin(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, Linear):
            return nn.Linear(layer.in_features, layer.out_features)
        if isinstance(layer, Conv2d):
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size
            return nn.Conv2d(*sizes, layer.stride, layer.padding, layer.dilation)
        if isinstance(layer, LSTM | GRU):
            sizes = layer.input_size, layer.hidden_size
            torchs = nn.LSTM if isinstance(layer, LSTM) else nn.GRU
            return torchs(*sizes, batch_first=layer.batch_first, bidirectional=layer.bidirectional)
        return None

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if (made := twin(child)) is not None:
                setattr(parent, name, made)
    return model.double()


class Reference:
    """A model in double precision: its dense twin on the composed weights, which autograd differentiates twice."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.twin, self.strength = dense_twin(model), strength
        self.tensors = {
            name: tensor.detach().double().requires_grad_(tensor.requires_grad)
            for name, tensor in model.named_parameters()
        }
        self.specs = {name: module.spec for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
        self.corrected = [n for n in self.specs if any(factor.requires_grad for factor in self._factors(n).values())]

    @property
    def trained(self) -> Tensors:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def gradients(self, x: np.ndarray, y: np.ndarray, rate: float) -> tuple[float, Tensors, Tensors]:
        """The loss, and the gradients of the loss and of the regularizer by all trained tensors."""
        weights = {name: composed(spec, self._factors(name)) for name, spec in self.specs.items()}
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        loss = self._loss(leaves, x, y)
        penalty = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for name in self.corrected:
            (of_weight,) = torch.autograd.grad(loss, leaves[name], retain_graph=True)
            penalty = penalty + self._penalty(name, weights[name], of_weight, rate)
        loss = self._loss(weights, x, y)
        return loss.item(), self._gradient(loss), self._gradient(penalty)

    def _penalty(self, name: str, weight: torch.Tensor, of_weight: torch.Tensor, rate: float) -> torch.Tensor:
        factors = self._factors(name)
        trained = [part for part, factor in factors.items() if factor.requires_grad]
        steps = torch.autograd.grad(weight, [factors[part] for part in trained], of_weight, create_graph=True)
        stepped = {part: factors[part] - rate * step for part, step in zip(trained, steps, strict=True)}
        after = composed(self.specs[name], {**factors, **stepped})
        return self.strength / 2 * (after - (weight - rate * of_weight)).square().sum()

    def _factors(self, name: str) -> Tensors:
        own = {tensor.removeprefix(f"{name}."): value for tensor, value in self.tensors.items()}
        return {part: value for part, value in own.items() if "." not in part and part != "bias"}

    def _loss(self, weights: Tensors, x: np.ndarray, y: np.ndarray) -> torch.Tensor:
        names = {name for name, _ in self.twin.named_parameters()}
        dense = {name if name in names else f"{name}.weight": weight for name, weight in weights.items()}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in names} | dense
        assert tensors.keys() == names
        outputs = functional_call(self.twin, tensors, torch.from_numpy(x).double())
        return F.cross_entropy(outputs, torch.from_numpy(y))

    def _gradient(self, value: torch.Tensor) -> Tensors:
        found = torch.autograd.grad(value, list(self.trained.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(self.trained, found, strict=True))


def options_for(shape: tuple[int, ...], strength: float, optimizer: str = "sgd", **constants: Any) -> ExportConfig:
    return ExportConfig(
        name="test",
        input_shape=shape,
        input_dtype="float32",
        optimizer=optimizer,
        jacobian_correction=strength,
        **constants,
        engines=("onnxruntime",),
    )


def export(
    model: nn.Module,
    folder: Path,
    shape: tuple[int, ...],
    strength: float = LAMBDA,
    optimizer: str = "sgd",
    **more: Any,
) -> Bundle:
    return export_bundle(model, folder / f"{optimizer} {strength:g}", options_for(shape, strength, optimizer, **more))[
        0
    ]


def step_of(bundle: Bundle, x: np.ndarray, y: np.ndarray, rate: float) -> dict[str, np.ndarray]:
    settings = {"weights": weights_of(bundle), "learning_rate": np.float32(rate)}
    return run_step(bundle.file("train_step.onnx"), x, y, **settings)


def pieces(bundle: Bundle, vector: NDArray[Any]) -> dict[str, NDArray[Any]]:
    tensors = bundle.manifest.layout.with_role("shared", "personal")
    ends = np.cumsum([tensor.size for tensor in tensors])
    assert ends[-1] == len(vector)
    parts = np.split(vector, ends[:-1])
    return {tensor.name: part.reshape(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)}


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors.values()))


@pytest.mark.slow
@every_model
def test_the_gradient_is_that_of_torch_on_any_batch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    factory, shape = MODELS[name]
    model = factory()
    bundle, reference = export(model, tmp_path, shape), Reference(model, LAMBDA)
    for rows in (1, 17):
        x, y = batch(shape, rows)
        step = step_of(bundle, x, y, RATE)
        loss, plain, correction = reference.gradients(x, y, RATE)
        assert float(step["loss"]) == pytest.approx(loss, rel=TOLERANCE)
        found = pieces(bundle, step["gradient"])
        assert found.keys() == plain.keys()
        for tensor, gradient in found.items():
            assert relative_error(gradient, (plain[tensor] + correction[tensor]).numpy()) < TOLERANCE, tensor
        factors = {f"{layer}.{part}" for layer in reference.corrected for part in reference._factors(layer)}
        corrected = factors & plain.keys()
        assert {tensor for tensor, gradient in correction.items() if gradient.any()} == corrected
        assert norm({n: correction[n] for n in corrected}) > 0.01 * norm({n: plain[n] for n in corrected})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_follow_torch(optimizer: str, tmp_path: Path) -> None:
    """The correction comes before the affine term and clipping, and the optimizer sees it."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear(12, 12, rank=3, kind="pfedpara"), nn.Tanh(), Linear(12, 5, rank=3, tanh=True))
    rate = RATES[optimizer]
    strength = 0.2 / rate**2  # the correction grows with both
    with without_verification():
        bundle = export(model, tmp_path, VECTOR, strength, **OPTIONS[optimizer])
    for adjustment in (Adjustment(), Adjustment(mu=0.1, max_norm=0.5)):
        engine, reference = open_engine(bundle, "onnxruntime", threads=1), Reference(model, strength)
        parameters = nn.ParameterList(reference.trained.values())
        torchs = torch_optimizer(optimizer, parameters, rate)
        for number in range(20):
            x, y = batch(VECTOR, 16 if number % 2 else 7)
            loss, plain, correction = reference.gradients(x, y, rate)
            assert norm(correction) > 0.05 * norm(plain)
            for tensor, parameter in zip(reference.trained, parameters, strict=True):
                parameter.grad = plain[tensor] + correction[tensor] + adjustment.mu * parameter.detach()
            nn.utils.clip_grad_norm_(parameters, adjustment.max_norm)
            torchs.step()
            found = engine.step(x, y, learning_rate=rate, seed=0, adjustment=adjustment)
            assert found == pytest.approx(loss, rel=TOLERANCE)
        for tensor, value in engine.read().items():
            assert relative_error(value, reference.tensors[tensor].detach().numpy()) < TOLERANCE, tensor


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Linear(12, 12, rank=3), nn.Tanh(), Linear(12, 5, rank=2))


def test_it_is_in_the_fingerprint_and_nowhere_if_it_is_not_asked_for(tmp_path: Path) -> None:
    with without_verification():
        bundles = {strength: export(small(), tmp_path, VECTOR, strength) for strength in (0.0, 1.0, 2.0)}
    assert [bundle.manifest.optimizer.get("jacobian_correction") for bundle in bundles.values()] == [None, 1.0, 2.0]
    assert len({bundle.manifest.fingerprint for bundle in bundles.values()}) == 3
    assert optimizer_constants("sgd", jacobian_correction=0.0) == optimizer_constants("sgd")
    sizes = [bundle.file("train_step.onnx").stat().st_size for bundle in bundles.values()]
    assert sizes[0] < sizes[1]
    evaluations = {bundle.file("eval_step.onnx").read_bytes() for bundle in bundles.values()}
    assert len(evaluations) == 1


def test_layers_are_composed_that_would_be_contracted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(12, 12, rank=1, kind="lowrank"), nn.Tanh(), Linear(12, 5, rank=1))
    assert contract_layers(copy.deepcopy(model), [torch.zeros(4, *VECTOR)], 32)
    bundle, reference = export(model, tmp_path, VECTOR), Reference(model, LAMBDA)
    x, y = batch(VECTOR, 5)
    _, plain, correction = reference.gradients(x, y, RATE)
    for name, gradient in pieces(bundle, step_of(bundle, x, y, RATE)["gradient"]).items():
        assert relative_error(gradient, (plain[name] + correction[name]).numpy()) < TOLERANCE, name


def test_the_export_verifies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = training_step.append_correction

    def wrong(*arguments: Any, strength: float, **settings: Any) -> dict[str, str]:
        return right(*arguments, strength=1.01 * strength, **settings)

    monkeypatch.setattr(training_step, "append_correction", wrong)
    with pytest.raises(FedparaError, match=r"onnxruntime: gradient of '.*': expected torch's result within 1e-05"):
        export(small(), tmp_path, VECTOR, 1.0)
    assert not any(tmp_path.iterdir())


def contracted() -> nn.Module:
    model = small()
    model[2].contracted = True
    return model


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (contracted, r"layer '2': expected its composed weight in the graph, .* exclude that layer"),
        (lambda: nn.Linear(12, 5), "jacobian_correction: expected a layer with trained factors, found none"),
    ],
)
def test_a_model_it_can_not_be_applied_to_is_refused(
    factory: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        export(factory(), tmp_path, VECTOR)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
def test_strengths_out_of_range_are_refused(strength: float) -> None:
    with pytest.raises(InputError, match="jacobian_correction: expected a number of at least 0, found"):
        Recipe(name="mlp", jacobian_correction=strength)


@pytest.mark.parametrize("engines", [ENGINES, ("ort-training",)])
def test_an_engine_without_second_derivatives_is_refused(engines: tuple[str, ...]) -> None:
    with pytest.raises(
        InputError, match=r"engines: .* jacobian_correction, found ort-training, .* onnxruntime"
    ) as found:
        Recipe(name="mlp", jacobian_correction=1.0, engines=engines)
    assert found.value.key == "engines"


def test_micro_batches_are_refused(tmp_path: Path) -> None:
    with without_verification():
        bundle = export(small(), tmp_path, VECTOR)
    engine = open_engine(bundle, "onnxruntime", threads=1)
    before, (x, y) = engine.read(), batch(VECTOR, 4)
    with pytest.raises(
        InputError, match=r"micro_batches: expected 1, as the Jacobian correction of .* needs .*, found 2"
    ):
        engine.step(x, y, learning_rate=0.1, seed=0, micro_batches=2)
    for name, tensor in engine.read().items():
        np.testing.assert_array_equal(tensor, before[name])


def test_the_command_line(run: Command, tmp_path: Path) -> None:
    bundle, data, update = tmp_path / "bundle", tmp_path / "data.npz", tmp_path / "update.safetensors"
    made = ("export", "mlp", "--input-shape", "1,6,6", "--jacobian-correction", 0.5, "-o", bundle)
    refused = run(*made, "--engines", "onnxruntime", "--engines", "ort-training")
    assert refused.code == 2
    assert "--engines: expected onnxruntime alone with jacobian_correction" in refused.err
    assert not bundle.exists()
    assert run(*made).code == 0
    assert open_bundle(bundle).manifest.engines == ("onnxruntime",)
    assert open_bundle(bundle).manifest.optimizer["jacobian_correction"] == 0.5
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (20, 1, 6, 6)).astype(np.uint8), generator.integers(0, 10, 20)
    np.savez(data, x=x, y=y)
    train = ("train", bundle, "--data", data, "--weights", bundle / "weights.safetensors", "-o", update)
    refused = run(*train, "--micro-batches", 2)
    assert refused.code == 2
    assert "--micro-batches: expected 1" in refused.err
    assert not update.exists()
    assert run(*train).code == 0
    assert update.exists()
