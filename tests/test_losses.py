"""Losses with options, of several outputs, and of labels that do not all count: as in torch, in both engines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command
from numpy.typing import NDArray
from small_net import without_verification
from torch import nn
from torch.nn import functional as F

from device_runtime import evaluate, open_data, open_engine
from device_runtime.engines.protocol import Engine
from export import export_bundle
from export.comparison import TOLERANCE
from fedpara_edge.errors import InputError
from fedpara_edge.formats.accuracy import count_correct, count_labels
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.losses import LOSSES, find_head, find_loss
from fedpara_edge.nn import Linear

ENGINES = ("onnxruntime", "ort-training")
RATE, CLOSE = 0.1, {"rtol": 1e-5, "atol": 1e-6}
CLASSES, FEATURES, STEPS = 4, 6, 5
OPTIONS = (
    "cross_entropy:label_smoothing=0.1",
    "cross_entropy:ignore_index=-1",
    "cross_entropy:class_weights=1,0.5,2,0",
    "cross_entropy:weight=0.5,label_smoothing=0.2,ignore_index=2,class_weights=1,0.5,2,3",
    "l1",
    "huber:delta=0.3",
    "mse:weight=2",
    "bce:pos_weight=3",
)


class Positions(nn.Module):
    """A class at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = Linear(FEATURES, 12, rank=2), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(x))).movedim(-1, 1)


class Heads(nn.Module):
    """A class, a class at each position and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.positions, self.number = nn.Linear(FEATURES, 12), nn.Linear(12, 3), nn.Linear(12, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.hidden(x))
        return {"number": self.number(h.mean(1)), "tags": self.positions(h).movedim(-1, 1), "hidden": h}


HEADS = ("tags=cross_entropy:ignore_index=-100,weight=0.5", "number=l1:weight=2")


def made(model: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportConfig(input_shape=(STEPS, FEATURES), loss=HEADS, output_name=("hidden",))
    bundle, verification = export_bundle(made(Heads), tmp_path_factory.mktemp("heads") / "bundle", options)
    assert all(errors.worst <= errors.limit for errors in verification.values())
    return bundle


def of_heads(rows: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Sequences of which ever more is padding: the last counts nowhere."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(0, 3, (rows, STEPS))
    steps[np.arange(STEPS) >= np.linspace(STEPS, 0, rows)[:, None]] = -100
    return {
        "x": generator.standard_normal((rows, STEPS, FEATURES)).astype(np.float32),
        "y_tags": steps,
        "y_number": generator.standard_normal((rows, 1)).astype(np.float32),
    }


def loss_of_heads(model: nn.Module, data: dict[str, NDArray[Any]]) -> torch.Tensor:
    found = model(torch.from_numpy(data["x"]))
    steps = F.cross_entropy(found["tags"], torch.from_numpy(data["y_tags"]), ignore_index=-100)
    return 0.5 * steps + 2 * F.l1_loss(found["number"], torch.from_numpy(data["y_number"]))


@pytest.mark.parametrize("loss", OPTIONS)
def test_losses_are_verified_against_torch(loss: str, tmp_path: Path) -> None:
    """With labels of which some are ignored; a wrong option would differ from torch's own function."""
    options = ExportConfig(input_shape=(STEPS, FEATURES), loss=(loss,))
    bundle, verification = export_bundle(made(Positions), tmp_path / "bundle", options)
    assert verification.keys() == set(ENGINES)
    assert max(errors.worst for errors in verification.values()) <= TOLERANCE
    assert str(bundle.interface.heads[0].loss) == loss
    assert bundle.interface.labels[0].name == "y"


def steps_of(engine: Engine, batches: list[dict[str, NDArray[Any]]], micro_batches: int) -> list[float]:
    return [engine.step(data, data, learning_rate=RATE, seed=0, micro_batches=micro_batches) for data in batches]


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 7])
@pytest.mark.parametrize("engine", ENGINES)
def test_several_heads_train_as_in_torch_however_they_are_split(engine: str, micro_batches: int, heads: Bundle) -> None:
    model, batches = made(Heads), [of_heads(7, seed) for seed in range(3)]
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for data in batches:
        loss = loss_of_heads(model, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    running = open_engine(heads, engine, threads=1)
    assert steps_of(running, batches, micro_batches) == pytest.approx(losses, rel=1e-5)
    for name, tensor in running.read().items():
        np.testing.assert_allclose(tensor, model.get_parameter(name).detach().numpy(), **CLOSE)


@pytest.mark.parametrize("loss", ["cross_entropy:ignore_index=-1", "cross_entropy:class_weights=1,0.5,2,3"])
@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_count_what_the_loss_counts(engine: str, loss: str, tmp_path: Path) -> None:
    options = ExportConfig(input_shape=(STEPS, FEATURES), loss=(loss,), engines=(engine,))
    with without_verification():
        bundle, _ = export_bundle(made(Positions), tmp_path / "bundle", options)
    generator = np.random.default_rng(0)
    y = generator.integers(0, CLASSES, (9, STEPS))
    if "ignore" in loss:
        y[np.arange(STEPS) >= np.array([5, 0, 0, 1, 0, 2, 0, 0, 0])[:, None]] = -1
    batch = {"x": generator.standard_normal((9, STEPS, FEATURES)).astype(np.float32), "y": y}
    whole, split = (open_engine(bundle, engine, threads=1) for _ in range(2))
    assert steps_of(whole, [batch] * 3, 1) == pytest.approx(steps_of(split, [batch] * 3, 4), rel=1e-5)
    for name, tensor in whole.read().items():
        np.testing.assert_allclose(tensor, split.read()[name], **CLOSE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_nothing_but_padding_changes_nothing(engine: str, tmp_path: Path) -> None:
    options = ExportConfig(input_shape=(STEPS, FEATURES), loss=("cross_entropy:ignore_index=-1",), engines=(engine,))
    with without_verification():
        bundle, _ = export_bundle(made(Positions), tmp_path / "bundle", options)
    running = open_engine(bundle, engine, threads=1)
    before, batch = running.read(), {"x": np.ones((3, STEPS, FEATURES), np.float32), "y": np.full((3, STEPS), -1)}
    assert steps_of(running, [batch, batch], 2) == [0, 0]
    for name, tensor in running.read().items():
        np.testing.assert_array_equal(tensor, before[name])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_an_evaluation_does_not_depend_on_its_batches(
    engine: str, batch_size: int, heads: Bundle, tmp_path: Path
) -> None:
    data = of_heads(20)
    np.savez(tmp_path / "data.npz", **data)
    running = open_engine(heads, engine, threads=1)
    found = evaluate(running, open_data(tmp_path / "data.npz", heads.manifest), batch_size)
    model = made(Heads)
    assert found.loss == pytest.approx(loss_of_heads(model, data).item(), rel=1e-5)
    predicted = model(torch.from_numpy(data["x"]))["tags"].argmax(1).numpy()
    counting = data["y_tags"] != -100
    assert found.accuracy == pytest.approx((predicted == data["y_tags"])[counting].mean())
    assert found.counts.keys() == {"y_tags", "y_number"}


def test_ignored_labels_are_labels_of_the_data(heads: Bundle, tmp_path: Path) -> None:
    data = of_heads(5)
    data["y_tags"][0, 0] = -1
    np.savez(tmp_path / "data.npz", **data)
    with pytest.raises(InputError, match=r"array 'y_tags', row 0: expected integers in \[0, 3\) or -100, found -1"):
        open_data(tmp_path / "data.npz", heads.manifest)


def test_ignored_labels_are_neither_right_nor_wrong() -> None:
    loss, outputs = find_loss("cross_entropy:ignore_index=1"), np.eye(3, dtype=np.float32)
    labels = np.array([0, 1, 0])
    assert (count_correct(loss, outputs, labels), count_labels(loss, labels)) == (1, 2)


def test_heads_are_predicted_and_shown(heads: Bundle, tmp_path: Path, run: Command) -> None:
    np.savez(tmp_path / "data.npz", **of_heads(9))
    for arguments in (
        ("train", heads.path, "--data", tmp_path / "data.npz", "--weights", heads.path / "weights.safetensors"),
        ("fold", heads.path, "--weights", heads.path / "weights.safetensors"),
    ):
        output = tmp_path / ("model.onnx" if arguments[0] == "fold" else "update.safetensors")
        state = ("--state", tmp_path / "state") if arguments[0] == "train" else ("--data", tmp_path / "data.npz")
        ended = run(*arguments, "-o", output, *state)
        assert ended.code == 0, ended.err
    ended = run("predict", tmp_path / "model.onnx", "--data", tmp_path / "data.npz", "-o", tmp_path / "p.npz")
    assert ended.code == 0, ended.err
    with np.load(tmp_path / "p.npz") as found:
        assert {name: array.shape for name, array in found.items()} == {
            "tags": (9, 3, STEPS),
            "number": (9, 1),
            "hidden": (9, STEPS, 12),
            "predicted": (9, STEPS),
        }
    shown = run("inspect", heads.path, "--json").json
    assert [(head["output"]["name"], head["label"]["name"], head["loss"]) for head in shown["heads"]] == [
        ("tags", "y_tags", "cross_entropy:weight=0.5,ignore_index=-100"),
        ("number", "y_number", "l1:weight=2"),
    ]


def test_losses_are_spelled_as_they_are_typed() -> None:
    for text in (*OPTIONS, *(name for name in LOSSES if name != "own")):
        assert str(find_loss(text)) == text
    assert find_head("a=huber:delta=2") == ("a", find_loss("huber:delta=2"))
    assert find_head("huber:delta=2") == (None, find_loss("huber:delta=2"))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("hinge", "loss: expected one of cross_entropy, mse, l1, huber, bce, own, found 'hinge'"),
        ("huber:delta=0", "loss: huber: delta: expected a positive number, found 0.0"),
        ("cross_entropy:smoothing=1", "loss: cross_entropy: smoothing: expected an option of it, found an unknown one"),
        (("mse", "l1"), "loss: expected one, or several with the name of a different output each"),
        (("a=mse", "a=l1"), "loss: expected one, or several with the name of a different output each"),
        ((), "loss: expected one, or several"),
        ("cross_entropy:class_weights=1,2", "loss: cross_entropy: class_weights: expected a number for each of 4"),
        ("other=mse", "output_name: expected one of logits, found 'other'"),
    ],
)
def test_losses_that_do_not_fit(loss: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_bundle(made(Positions), tmp_path / "b", ExportConfig(input_shape=(STEPS, FEATURES), loss=loss))
    assert str(caught.value).startswith(words)
