"""The engine `ort-training` trains like torch, deterministically, and goes on exactly where it was saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device_runtime.ort_training import OrtTraining, open_engine
from export import ExportOptions, export_bundle
from export.artifacts import optimizer_constants
from fedpara_edge.bundle import Bundle
from fedpara_edge.errors import WrongBundleError
from fedpara_edge.nn import Conv2d, Linear

SHAPE = (1, 8, 8)
STEPS = 50


def small_net(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        Conv2d(1, 8, 3, rank=2, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        Linear(128, 5, rank=3),
    )


def bundle_of(model: nn.Module, folder: Path, optimizer: str) -> Bundle:
    options = ExportOptions(
        name="small", input_shape=SHAPE, input_dtype="float32", optimizer=optimizer_constants(optimizer)
    )
    return export_bundle(model, folder / "bundle", options)[0]


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [
        (generator.standard_normal((size, *SHAPE), dtype=np.float32), generator.integers(0, 5, size))
        for size in (16, 7) * (count // 2)
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fifty_steps_agree_with_torch(optimizer: str, tmp_path: Path) -> None:
    model = small_net()
    engine = open_engine(bundle_of(model, tmp_path, optimizer), threads=1)
    rate = 0.05 if optimizer == "sgd" else 0.002
    if optimizer == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    else:
        reference = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for x, y in batches(STEPS):
        loss = engine.step(x, y, learning_rate=rate, seed=0)
        reference.zero_grad()
        expected = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        expected.backward()
        reference.step()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    trained = engine.read()
    for name, tensor in model.state_dict().items():
        error = np.linalg.norm(trained[name] - tensor.numpy()) / np.linalg.norm(tensor.numpy())
        assert error < 1e-4, name


def run(engine: OrtTraining, data: list[tuple[np.ndarray, np.ndarray]], first: int = 0) -> list[float]:
    return [engine.step(x, y, learning_rate=0.01, seed=first + i) for i, (x, y) in enumerate(data)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_restored_engine_continues_to_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    bundle = bundle_of(small_net(dropout=0.3), tmp_path, optimizer)
    data = batches(10)
    whole = open_engine(bundle, threads=1)
    losses = run(whole, data)
    part = open_engine(bundle, threads=1)
    run(part, data[:4])
    state = part.state()
    later = open_engine(bundle, threads=1)
    later.restore(state)
    assert run(later, data[4:], first=4) == losses[4:]
    for name, tensor in whole.read().items():
        np.testing.assert_array_equal(later.read()[name], tensor)


def test_dropout_follows_the_seed_and_is_off_in_evaluation(tmp_path: Path) -> None:
    bundle = bundle_of(small_net(dropout=0.5), tmp_path, "sgd")
    (x, y), *_ = batches(2)
    engine = open_engine(bundle)
    same, other = (engine.step(x, y, learning_rate=1e-30, seed=seed) for seed in (1, 2))
    again = engine.step(x, y, learning_rate=1e-30, seed=1)
    assert same == again != other
    assert engine.evaluate(x, y)[0] == engine.evaluate(x, y)[0]


def test_loaded_tensors_are_read_back_and_used(tmp_path: Path) -> None:
    engine = open_engine(bundle_of(small_net(), tmp_path, "sgd"))
    (x, y), *_ = batches(2)
    before = engine.evaluate(x, y)[1]
    tensors = {name: tensor * 2 for name, tensor in engine.read().items()}
    engine.load(tensors)
    for name, tensor in engine.read().items():
        np.testing.assert_array_equal(tensor, tensors[name])
    assert not np.allclose(engine.evaluate(x, y)[1], before)


def test_evaluation_leaves_the_training_alone(tmp_path: Path) -> None:
    bundle = bundle_of(small_net(), tmp_path, "adamw")
    data = batches(6)
    plain, evaluated = open_engine(bundle, threads=1), open_engine(bundle, threads=1)
    expected = run(plain, data)
    found = []
    for number, (x, y) in enumerate(data):
        evaluated.evaluate(x, y)
        found.append(evaluated.step(x, y, learning_rate=0.01, seed=number))
        evaluated.evaluate(x, y)
    assert found == expected


def test_damaged_artifacts_are_refused_in_one_line(tmp_path: Path) -> None:
    bundle = bundle_of(small_net(), tmp_path, "sgd")
    bundle.file("training_model.onnx").write_bytes(b"not onnx")
    with pytest.raises(WrongBundleError, match="expected artifacts"):
        open_engine(bundle)
