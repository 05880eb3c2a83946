"""Losses of the user's own, functions and modules of outputs and labels, in both engines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command
from torch import nn

from device_runtime import open_engine
from export import export_bundle
from export.comparison import TOLERANCE
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig

SOURCE = '''
import torch
from torch import nn
from torch.nn import functional as F


class Focal(nn.Module):
    """Focal loss with a weight for each class."""

    def __init__(self):
        super().__init__()
        self.register_buffer("alpha", torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, outputs, labels):
        log_p = F.log_softmax(outputs, 1).gather(1, labels[:, None])[:, 0]
        return (-self.alpha[labels] * (1 - log_p.exp()) ** 2 * log_p).mean()


def quantile(outputs, labels):
    """Pinball loss of the 0.9 quantile."""
    difference = labels - outputs
    return torch.maximum(0.9 * difference, -0.1 * difference).mean()


def dice(outputs, labels):
    """Over the whole batch: no mean of rows."""
    p = torch.sigmoid(outputs)
    return 1 - 2 * (p * labels).sum() / (p.sum() + labels.sum() + 1)


def each(outputs, labels):
    return (outputs - labels).square()


def broken(outputs, labels):
    return outputs.nothing
'''
ENGINES = ("onnxruntime", "ort-training")
RATE, ROWS = 0.1, 7


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    path = tmp_path / "losses.py"
    path.write_text(SOURCE)
    return path


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def exported(folder: Path, loss: str) -> Bundle:
    options = ExportConfig(input_shape=(6,), loss=(loss,))
    bundle, verification = export_bundle(net(), folder / "bundle", options)
    assert verification.keys() == set(ENGINES)
    assert max(errors.worst for errors in verification.values()) <= TOLERANCE
    return bundle


@pytest.mark.parametrize(
    ("name", "kind", "stored"),
    [
        ("Focal", "classes", "own:function=Focal,kind=classes"),
        ("quantile", "numbers", "own:function=quantile"),
        ("dice", "probabilities", "own:function=dice,kind=probabilities,mean=false"),
    ],
)
def test_own_losses_train_as_in_torch(name: str, kind: str, stored: str, losses: Path, tmp_path: Path) -> None:
    bundle = exported(tmp_path, f"{losses}:{name}:kind={kind}")
    (head,) = bundle.interface.heads
    assert str(head.loss) == stored
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    function = scope[name]() if name == "Focal" else scope[name]
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS, 6)).astype(np.float32)
    y = generator.integers(0, 3, ROWS) if kind == "classes" else generator.random((ROWS, 3)).astype(np.float32)
    model = net()
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=RATE), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = function(model(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for engine in ENGINES:
        running = open_engine(bundle, engine, threads=1)
        micro_batches = 3 if head.loss.divisible else 1
        found = [running.step(x, y, learning_rate=RATE, seed=0, micro_batches=micro_batches) for _ in range(3)]
        assert found == pytest.approx(expected, rel=1e-5)
        if not head.loss.divisible:
            with pytest.raises(InputError, match="micro_batches: expected 1 with the loss own:function=dice"):
                running.step(x, y, learning_rate=RATE, seed=0, micro_batches=2)


def test_classes_are_pointed_to_where_numbers_do_not_fit(losses: Path, tmp_path: Path) -> None:
    config = ExportConfig(input_shape=(6,), loss=(f"{losses}:Focal",))
    with pytest.raises(InputError, match=r"Focal: expected to take .*; for classes as labels, add :kind=classes"):
        export_bundle(net(), tmp_path / "bundle", config)
    with pytest.raises(InputError, match=r"array 'y': expected .* add :kind=classes to the loss if they are classes"):
        export_bundle(net(), tmp_path / "bundle", config, examples={"y": np.arange(4) % 3})


@pytest.mark.slow
def test_own_losses_are_left_out_of_folded_models(losses: Path, tmp_path: Path, run: Command) -> None:
    bundle = exported(tmp_path, f"{losses}:Focal:kind=classes")
    losses.unlink()
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((9, 6)).astype(np.float32), generator.integers(0, 3, 9)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    weights, data = ("--weights", bundle.file("weights.safetensors")), ("--data", tmp_path / "data.npz")
    folded = run("fold", bundle.path, *weights, *data, "-o", tmp_path / "model.onnx")
    assert folded.code == 0, folded.err
    predicted = run("predict", tmp_path / "model.onnx", *data, "-o", tmp_path / "p.npz", "--json").json
    evaluated = run("evaluate", bundle.path, *weights, *data, "--json").json
    assert predicted["accuracy"] == evaluated["accuracy"]
    with np.load(tmp_path / "p.npz") as found:
        np.testing.assert_allclose(found["logits"], net()(torch.from_numpy(x)).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "expected a function or module 'missing' in "),
        ("each", r"each: expected one floating number, found \[4, 3\]; take its mean"),
        (
            "broken",
            r"broken: expected to take outputs \[4, 3\] and labels .* \[4, 3\], found AttributeError",
        ),
        ("quantile:kind=class", "loss: own: kind: expected one of classes, probabilities, numbers, found 'class'"),
    ],
)
def test_own_losses_that_do_not_fit(name: str, words: str, losses: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        exported(tmp_path, f"{losses}:{name}")
