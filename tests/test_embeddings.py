"""Embeddings with padding and bags of embeddings train as in torch, in both engines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device_runtime.engines.registry import open_engine
from export import export_bundle
from export.comparison import TOLERANCE
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig

TOKENS, LENGTH = 20, 7


class Padded(nn.Module):
    """An embedding with padding, whose row of padding is not zero, and a mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 6, padding_idx=3), nn.Linear(6, 4)
        nn.init.normal_(self.embed.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x).mean(1))


def bags(**options: object) -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(TOKENS, 6, **options), nn.Linear(6, 4))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(TOKENS, 6, mode="sum"), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(x, per_sample_weights=(x % 3 + 1).to(self.bag.weight.dtype)))


MODELS = {
    "padding": Padded,
    "functional padding": lambda: Functional(),
    "sums": lambda: bags(mode="sum"),
    "means": lambda: bags(mode="mean"),
    "largest": lambda: bags(mode="max"),
    "padded sums": lambda: bags(mode="sum", padding_idx=0),
    "padded means": lambda: bags(mode="mean", padding_idx=0),
    "padded largest": lambda: bags(mode="max", padding_idx=0),
    "weighted sums": Weighted,
}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Parameter(torch.randn(TOKENS, 6)), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.embedding(x, self.rows, padding_idx=-2).mean(1))


def exported(model: nn.Module, folder: Path, *engines: str) -> Bundle:
    options = ExportConfig(
        name="test", input_shape=(LENGTH,), input_dtype="int64", tokens=TOKENS, engines=engines or ("onnxruntime",)
    )
    bundle, verification = export_bundle(model, folder / "bundle", options)
    assert max(entry.worst for entry in verification.values()) <= TOLERANCE
    return bundle


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_torch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    bundle = exported(model, tmp_path)
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, TOKENS, (5, LENGTH)), generator.integers(0, 4, 5)
    x[0] = 0  # a bag of padding alone
    x[1, :4] = 3
    engine = open_engine(bundle, "onnxruntime")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(3):
        loss = engine.step(x, y, learning_rate=0.1, seed=number)
        expected = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    for key, tensor in engine.read().items():
        np.testing.assert_allclose(tensor, model.state_dict()[key].numpy(), rtol=1e-4, atol=1e-6)


def test_the_row_of_padding_stays(tmp_path: Path) -> None:
    model = Padded()
    row = model.embed.weight[3].detach().numpy().copy()
    engine = open_engine(exported(model, tmp_path), "onnxruntime")
    engine.step(np.full((2, LENGTH), 3), np.array([0, 1]), learning_rate=0.5, seed=0)
    np.testing.assert_array_equal(engine.read()["embed.weight"][3], row)


@pytest.mark.parametrize("name", ["means", "padded means", "largest", "weighted sums"])
def test_bags_train_in_both_engines(name: str, tmp_path: Path) -> None:
    exported(MODELS[name](), tmp_path, "ort-training", "onnxruntime")


REFUSED = {
    "max_norm": (lambda: bags(max_norm=1.0), r"module '0': expected an embedding without max_norm"),
    "scale_grad_by_freq": (lambda: bags(scale_grad_by_freq=True), r"without scale_grad_by_freq"),
    "sparse": (lambda: bags(sparse=True, mode="sum"), r"without sparse"),
    "offsets": (lambda: Offsets(), r"an EmbeddingBag with offsets; give it its indices as \[batch, length\]"),
}


class Offsets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(TOKENS, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(x.flatten(), torch.tensor([0, 2, 3, 9])))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        exported(make(), tmp_path)
