"""Random numbers of a model's own: from the step's seed, verified in torch, and in training only, in both engines."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime import InferenceSession, set_seed
from step_models import batch, export, run
from torch import nn
from torch.nn import functional as F

from device_runtime.engines.registry import open_engine
from export import export_bundle
from export.forward.graph import IR_VERSION, OPSET
from export.forward.tracing import Trace
from export.gradients import Graph
from export.gradients.builder import initializers_of
from export.step.draws import Draws, from_coins
from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.bundle import ENGINES
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import convert

SHAPE = (3, 4, 6)


class Noisy(nn.Module):
    """Two linear layers with a formula between them in training, and nothing in evaluation."""

    def __init__(self, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.formula, self.last = nn.Linear(6, 6), formula, nn.Linear(72, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last((self.formula(y) if self.training else y).flatten(1))


FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "drop path": lambda y: y * (torch.zeros(y.shape[0], 1, 1, 1).uniform_(0, 1) > 0.3).float() / 0.7,
    "drop path by coins": lambda y: y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.7) / 0.7,
    "drop path by probabilities": lambda y: y * torch.bernoulli(torch.full((y.shape[0], 1, 1, 1), 0.7)),
    "drop path by floor": lambda y: y / 0.7 * (0.7 + torch.rand(y.shape[0], 1, 1, 1)).floor(),
    "a shared draw": lambda y: y + torch.rand(6),
    "within bounds": lambda y: y + torch.empty_like(y).uniform_(-0.5, 0.25),
    "like an input": lambda y: y * torch.rand_like(y),
    "normal": lambda y: y + 0.1 * torch.randn_like(y),
    "normal of a size": lambda y: y + torch.randn(y.shape[0], 3, 1, 1),
    "normal with a mean": lambda y: y + torch.empty_like(y).normal_(0.5, 2.0),
    "two draws": lambda y: y + torch.rand_like(y) - torch.rand_like(y),
    "channels": lambda y: F.dropout2d(y, 0.5) + F.dropout3d(y, 0.3),
    "alpha": lambda y: F.alpha_dropout(y, 0.5, training=True),
    "with a dropout": lambda y: F.dropout(y, 0.3) + 0.1 * torch.randn_like(y),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
def test_draws_are_those_of_the_seed(name: str, tmp_path: Path) -> None:
    """The export itself compares them with torch's, given the same numbers."""
    torch.manual_seed(0)
    bundle = export(Noisy(FORMULAS[name]), tmp_path, SHAPE)
    x, y = batch(SHAPE, 6)
    first, again, other = (run(bundle, x, y, seed=np.int64(seed))["gradient"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


@pytest.mark.parametrize("name", FORMULAS)
def test_onnxruntime_training_draws_as_well(name: str, tmp_path: Path) -> None:
    """The export compares it with torch, given the numbers of a seed; a device draws them from coins."""
    torch.manual_seed(0)
    model = Noisy(FORMULAS[name])
    engine = open_engine(export(model, tmp_path, SHAPE, engines=("ort-training",)), "ort-training")
    x, y = batch(SHAPE, 6)
    losses = [engine.step(x, y, learning_rate=0.0, seed=seed) for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-4
    (found,) = engine.evaluate(x, y).outputs.values()
    with torch.no_grad():
        np.testing.assert_allclose(found, model.eval()(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)


def test_coins_give_independent_uniform_numbers() -> None:
    graph = Graph(Trace({}, {}, {}))
    first, second = (from_coins(graph, graph.ints(100, 200), number) for number in range(2))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (100, 200)) for name in (first, second)]
    made = helper.make_graph(graph.nodes, "draws", [], outputs, initializers_of(graph.nodes, graph.initializers))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    set_seed(3)
    one, other = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})
    for numbers in (one, other):
        assert 0 <= numbers.min() <= numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 0.009  # four standard deviations
        assert abs(numbers.var() - 1 / 12) < 0.003
        assert (numbers * 2**24 % 1 == 0).all()
        assert len(np.unique(numbers)) > 19900
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03


def test_draws_beside_running_statistics_and_several_outputs(tmp_path: Path) -> None:
    """Torch normalizes no single row, so the export compares with what it makes of two equal ones."""
    model, _ = convert(Headed(), Factorization(kind="dense", batchnorm="train"))
    losses = {"loss": ("first=cross_entropy", "second=mse:weight=0.5")}
    options = ExportConfig(name="test", input_shape=(6,), input_dtype="float32", engines=ENGINES, **losses)
    bundle, _ = export_bundle(model, tmp_path / "bundle", options)
    x = np.random.default_rng(0).standard_normal((5, 6), dtype=np.float32)
    y = {"y_first": np.arange(5) % 3, "y_second": np.zeros((5, 2), np.float32)}
    outcomes = [open_engine(bundle, name).evaluate(x, y) for name in ENGINES]
    np.testing.assert_allclose(outcomes[0].losses, outcomes[1].losses, rtol=1e-5)
    for name, output in outcomes[0].outputs.items():
        np.testing.assert_allclose(output, outcomes[1].outputs[name], rtol=1e-5, atol=1e-6)


class Headed(nn.Module):
    """A BatchNorm, noise in training, and two linear layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(x)
        y = y + torch.randn_like(y) if self.training else y
        return {"first": self.first(y), "second": self.second(y)}


LAYERS = {
    "channels of sequences": lambda: nn.Dropout1d(0.5),
    "channels of images": lambda: nn.Dropout2d(0.5),
    "channels of volumes": lambda: nn.Dropout3d(0.5),
    "alpha": lambda: nn.AlphaDropout(0.3),
    "channels, alpha": lambda: nn.FeatureAlphaDropout(0.3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_drop_whole_channels_or_in_another_way(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = (4, 6) if "sequences" in name else SHAPE
    model = nn.Sequential(nn.Linear(6, 6), LAYERS[name](), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(2, *shape))
    bundle = export(model, tmp_path, shape)
    x, y = batch(shape, 6)
    losses = {float(run(bundle, x, y, seed=np.int64(seed))["loss"]) for seed in range(3)}
    assert len(losses) == 3


def test_evaluation_draws_nothing(tmp_path: Path) -> None:
    model = Noisy(FORMULAS["drop path"])
    engine = open_engine(export(model, tmp_path, SHAPE), "onnxruntime")
    x, y = batch(SHAPE, 6)
    (found,) = engine.evaluate(x, y).outputs.values()
    with torch.no_grad():
        np.testing.assert_allclose(found, model.eval()(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)


def test_numbers_are_distributed_as_they_must() -> None:
    with Draws(5):
        uniform, normal, coins = torch.rand(20000), torch.randn(20000), torch.empty(20000).bernoulli_(0.3)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.009  # four standard deviations
    assert abs(uniform.var() - 1 / 12) < 0.003
    assert abs(normal.mean()) < 0.03
    assert abs(normal.var() - 1) < 0.04
    assert abs((normal**4).mean() - 3) < 0.3
    assert abs(coins.mean() - 0.3) < 0.013


REFUSED = {
    "in evaluation": (lambda y: torch.rand_like(y) * y, r"expected random numbers in training only, found RandomUnif"),
    "samples": (lambda y: y + torch.multinomial(y.flatten(1).softmax(1), 1)[:, :, None, None], r"found Multinomial"),
    "exponential": (lambda y: y + torch.empty_like(y).exponential_(), r"found exponential_; draw them from torch.rand"),
}


class Always(Noisy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.formula(self.first(x)).flatten(1))


@pytest.mark.parametrize("name", REFUSED)
def test_other_draws_are_refused(name: str, tmp_path: Path) -> None:
    formula, message = REFUSED[name]
    model = Always(formula) if name == "in evaluation" else Noisy(formula)
    with pytest.raises(InputError, match=message):
        export(model, tmp_path, SHAPE)
