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
from numpy.typing import NDArray
from small_net import OPTIMIZERS, torch_optimizer, without_verification
from step_models import IMAGE, VECTOR, batch, net, run_step, weights_of
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from device_runtime import Adjustment, open_engine
from export import ExportOptions, export_bundle, training_step
from export.contraction import contract_layers
from export.optimizers import optimizer_constants
from fedpara_edge.bundle import ENGINES, Bundle, open_bundle
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.layout import LayerSpec
from fedpara_edge.nn import GRU, LSTM, Conv2d, FactoredLayer, Linear
from fedpara_edge.recipe import Recipe

TOLERANCE = 1e-5
LAMBDA, RATE = 3.0, 0.5
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
        return self.last(self.recurrent(x)[0][:, -1])


def linears() -> nn.Module:
    layers = [Linear(12, 12, rank=3, **variant) for variant in VARIANTS]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())), nn.Linear(12, 5))


def convolutions(form: Any) -> nn.Module:
    layers = [Conv2d(i, i + 1, 3, rank=2, form=form, **v) for i, v in zip((2, 3, 4, 5), VARIANTS, strict=True)]
    return net(*(part for layer in layers for part in (layer, nn.Tanh())))


def mixed() -> nn.Module:
    """Strides, dense layers, a norm, a frozen factor, and names that the graph has for itself."""
    parts: dict[str, nn.Module] = {
        "new_first": Conv2d(2, 12, 3, rank=3, stride=2, padding=1, kind="pfedpara"),
        "norm": nn.GroupNorm(2, 12),
        "tanh": nn.Tanh(),
        "dense": nn.Conv2d(12, 6, 3),
        "second": Conv2d(6, 6, (1, 3), rank=3, dilation=(1, 1)),
        "flat": nn.Flatten(),
        "last": Linear(48, 5, rank=2),
    }
    parts["second"].x2.requires_grad_(False)
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

    @property
    def trained(self) -> Tensors:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def gradients(self, x: np.ndarray, y: np.ndarray, rate: float) -> tuple[float, Tensors, Tensors]:
        """The loss, and the gradients of the loss and of the regularizer by all trained tensors."""
        weights = {name: composed(spec, self._factors(name)) for name, spec in self.specs.items()}
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        of_weights = torch.autograd.grad(self._loss(leaves, x, y), list(leaves.values()))
        penalty = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for (name, weight), of_weight in zip(weights.items(), of_weights, strict=True):
            penalty = penalty + self._penalty(name, weight, of_weight, rate)
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


def options_for(shape: tuple[int, ...], strength: float, optimizer: str = "sgd", **constants: Any) -> ExportOptions:
    return ExportOptions(
        name="test",
        input_shape=shape,
        input_dtype="float32",
        optimizer=optimizer_constants(optimizer, jacobian_correction=strength, **constants),
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


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


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
            assert relative(gradient, (plain[tensor] + correction[tensor]).numpy()) < TOLERANCE, tensor
        corrected = {tensor for tensor, gradient in correction.items() if gradient.any()}
        assert (
            corrected == {f"{n}.{p}" for n, s in reference.specs.items() for p in reference._factors(n)} & plain.keys()
        )
        assert norm({n: correction[n] for n in corrected}) > 0.01 * norm({n: plain[n] for n in corrected})
