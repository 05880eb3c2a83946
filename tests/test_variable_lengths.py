"""Sequences of several lengths, padded, with a mask as a second input: from arrays through plans to predictions."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command
from numpy.typing import NDArray
from small_net import without_verification
from tiny_plan import AtOnce, measured
from torch.nn import functional as F

from device_runtime import evaluate, open_data, open_engine
from device_runtime.engines.registry import ENGINES
from export import export_bundle
from fedpara_edge.formats.bundle import Bundle, open_bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import load_model
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.simulation.runner import simulate

LONGEST, TOKENS, TAGS, PADDING = 9, 12, 3, -100
INPUTS = (f"tokens:shape={LONGEST},dtype=int64,tokens={TOKENS}", f"mask:shape={LONGEST},dtype=bool")
LOSS = f"cross_entropy:ignore_index={PADDING}"
MODEL = f"""
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.near = nn.Embedding({TOKENS}, 8), nn.Conv1d(8, 16, 3, padding=1)
        self.tags = nn.Linear(16, {TAGS})

    def forward(self, tokens, mask):
        known = self.tokens(tokens) * mask[:, :, None].to(torch.float32)
        return self.tags(torch.tanh(self.near(known.transpose(1, 2))).transpose(1, 2)).transpose(1, 2)

def tagger():
    torch.manual_seed(0)
    return Tagger()
"""


def sentences(count: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random tokens of random lengths; a tag depends on the token and the one before."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, TOKENS, (count, LONGEST))
    mask = np.arange(LONGEST) < random.integers(2, LONGEST + 1, count)[:, None]
    before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    tags = (tokens + (before > TOKENS // 2)) % TAGS
    return {"tokens": np.where(mask, tokens, 0), "mask": mask, "y": np.where(mask, tags, PADDING)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagger")
    (folder / "tagger.py").write_text(MODEL)
    np.savez(folder / "all.npz", **sentences(240))
    return folder


@pytest.fixture(scope="module")
def bundle(place: Path) -> Bundle:
    model = load_model(f"{place / 'tagger.py'}:tagger")
    return export_bundle(model, place / "bundle", ExportConfig(input=INPUTS, loss=(LOSS,)))[0]


def summed_in_torch(place: Path, data: dict[str, NDArray[Any]]) -> tuple[torch.nn.Module, torch.Tensor, int]:
    """The model and the sum of its losses over sentences one by one, without any padding."""
    model = load_model(f"{place / 'tagger.py'}:tagger")
    losses = []
    for tokens, mask, y in zip(*data.values(), strict=True):
        length = int(mask.sum())
        outputs = model(torch.from_numpy(tokens[None, :length]), torch.ones(1, length, dtype=torch.bool))
        losses.append(F.cross_entropy(outputs, torch.from_numpy(y[None, :length]), reduction="sum"))
    return model, torch.stack(losses).sum(), int((data["y"] != PADDING).sum())


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_padded_batch_trains_as_its_sentences_do(
    engine: str, micro_batches: int, place: Path, bundle: Bundle
) -> None:
    data = sentences(14)
    model, summed, words = summed_in_torch(place, data)
    (summed / words).backward()
    running = open_engine(bundle, engine, threads=1)
    before = running.read()
    loss = running.step(data, data["y"], learning_rate=0.1, seed=0, micro_batches=micro_batches)
    assert loss == pytest.approx(summed.item() / words, rel=1e-5)
    for name, tensor in running.read().items():
        gradient = model.get_parameter(name).grad
        np.testing.assert_allclose(before[name] - tensor, 0.1 * gradient.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_stands_at_padded_positions_changes_nothing(engine: str, bundle: Bundle) -> None:
    data, found = sentences(14), []
    other = {**data, "tokens": np.where(data["mask"], data["tokens"], 5)}
    for each in (data, other):
        running = open_engine(bundle, engine, threads=1)
        losses = [running.step(each, each["y"], learning_rate=0.1, seed=0) for _ in range(2)]
        found.append((losses, running.read()))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        np.testing.assert_array_equal(tensor, found[1][1][name])


def split(place: Path, folder: Path, run: Command) -> list[Path]:
    further = ("--train", "tokens,y", "--further", "mask", "--clients", "3", "--test-share", "0.25")
    assert run("split", place / "all.npz", "-o", folder, *further).code == 0
    return sorted((folder / "test").glob("*.npz"))


def test_clients_together_are_the_evaluation_on_all_of_their_words(
    place: Path, bundle: Bundle, tmp_path: Path, run: Command
) -> None:
    tests = split(place, tmp_path / "clients", run)
    options = [option for path in tests for option in ("--data", path)]
    ended = run("evaluate", bundle.path, *options, "--json")
    assert ended.code == 0, ended.err
    parts = [np.load(path) for path in tests]
    everything = {name: np.concatenate([part[name] for part in parts]) for name in ("tokens", "mask", "y")}
    _, summed, words = summed_in_torch(place, everything)
    assert ended.json["loss"] == pytest.approx(summed.item() / words, rel=1e-5)
    np.savez(tmp_path / "all.npz", **everything)
    whole = run("evaluate", bundle.path, "--data", tmp_path / "all.npz", "--json").json
    assert ended.json["accuracy"] == pytest.approx(whole["accuracy"])
    alone = [client["loss"] for client in ended.json["clients"]]
    assert ended.json["loss"] != pytest.approx(np.mean(alone), rel=1e-6)  # of clients with as many sentences


PLAN = f"""
name = "tagger"
rounds = 3
[data]
path = "all.npz"
split = "iid"
clients = 3
train = ["tokens", "y"]
further = ["mask"]
test_share = 0.25
[model]
name = "tagger.py:tagger"
input = {list(INPUTS)}
loss = ["{LOSS}"]
gamma = 0.9
[train]
batch_size = 8
epochs = 6
lr = 0.5
[arms.small]
"""


def test_a_plan_trains_and_evaluates_words(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "plan.toml").write_text(PLAN.replace("tagger.py:", f"{place / 'tagger.py'}:"))
    monkeypatch.setattr("fedpara_edge.simulation.runner.open_pool", lambda *_, **__: nullcontext(AtOnce()))
    with without_verification():
        simulate(place / "plan.toml", place / "run")
    rounds = [line for line in measured(place / "run") if line["event"] == "round"]
    assert rounds[-1]["accuracy"] > 0.8 > rounds[0]["accuracy"] - 0.1
    job = RunFolder(place / "run").job("small", 0)
    made, weights = open_bundle(job.bundle), job.weights(3)
    total = words = 0.0
    for client in sorted((place / "run" / "work" / ".data" / "seed-0" / "clients").iterdir()):
        found = evaluate(open_engine(made, "onnxruntime"), open_data(client / "test", made), weights=weights)
        total, words = total + found.losses[0], words + found.counted[0]
    assert rounds[-1]["loss"] == pytest.approx(total / words, rel=1e-6)


def test_the_folded_tagger_predicts_words(bundle: Bundle, tmp_path: Path, run: Command) -> None:
    np.savez(tmp_path / "few.npz", **sentences(20, seed=3))
    assert run("fold", bundle.path, "-o", tmp_path / "tagger.onnx").code == 0
    ended = run("predict", tmp_path / "tagger.onnx", "--data", tmp_path / "few.npz", "-o", tmp_path / "p.npz", "--json")
    assert ended.code == 0, ended.err
    whole = run("evaluate", bundle.path, "--data", tmp_path / "few.npz", "--json").json
    assert ended.json["accuracy"] == pytest.approx(whole["accuracy"])
    assert np.load(tmp_path / "p.npz")["predicted"].shape == (20, LONGEST)
