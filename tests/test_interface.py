"""Models of several inputs and with named outputs: exported, trained, folded and predicted by the names of arrays."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from device_runtime import open_data, open_engine
from export import export_bundle
from export.folding.fold import fold
from export.forward.outputs import named_outputs
from fedpara_edge.errors import InputError, WrongBundleError
from fedpara_edge.formats.bundle import MANIFEST, WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.interface import ArraySpec, Interface
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights

ENGINES = ("onnxruntime", "ort-training")
INPUTS = ("signal:shape=3,8,mean=1,2,3,std=2", "day:dtype=int64,tokens=7", "valid:shape=8,dtype=bool")
RATE, CLOSE = 0.5, {"rtol": 2e-5, "atol": 1e-6}


@dataclass
class Result:
    """What some libraries' models return."""

    logits: torch.Tensor
    features: torch.Tensor
    attentions: tuple[torch.Tensor, ...] | None = None


class Table(nn.Module):
    """A signal with a mask and a column of categories; returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.signal, self.day, self.head = nn.Linear(3, 16), nn.Embedding(7, 16), nn.Linear(16, 4)

    def forward(self, signal: torch.Tensor, valid: torch.Tensor, day: torch.Tensor) -> Result:
        weight = valid[:, :, None].to(signal.dtype)
        mean = (torch.tanh(self.signal(signal.transpose(1, 2))) * weight).sum(1) / weight.sum(1).clamp(min=1)
        features = mean * self.day(day)
        return Result(self.head(features), features)


def examples(count: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(seed)
    return {
        "signal": generator.standard_normal((count, 3, 8)).astype(np.float32) + 2,
        "day": generator.integers(0, 7, count),
        "valid": generator.random((count, 8)) > 0.3,
        "y": generator.integers(0, 4, count),
    }


def deployed(model: nn.Module, data: Mapping[str, NDArray[Any]]) -> Result:
    """The model on raw inputs, in torch alone."""
    signal = (torch.from_numpy(data["signal"]) - torch.tensor([[1.0], [2.0], [3.0]])) / 2
    found: Result = model(signal=signal, day=torch.from_numpy(data["day"]), valid=torch.from_numpy(data["valid"]))
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Bundle]:
    torch.manual_seed(0)
    model = Table()
    options = ExportConfig(input=INPUTS, output_name=("logits", "features"))
    return model, export_bundle(model, tmp_path_factory.mktemp("table") / "bundle", options)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_several_inputs_train_as_in_torch(engine: str, micro_batches: int, table: tuple[nn.Module, Bundle]) -> None:
    model, bundle = table
    torch.manual_seed(0)
    model = Table()
    running, optimizer = open_engine(bundle, engine, threads=1), torch.optim.SGD(model.parameters(), lr=RATE)
    for seed in range(3):
        data = examples(11, seed)
        loss = F.cross_entropy(deployed(model, data).logits, torch.from_numpy(data["y"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = running.step(data, data["y"], learning_rate=RATE, seed=0, micro_batches=micro_batches)
        assert found == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in running.read().items():
        np.testing.assert_allclose(tensor, model.get_parameter(name).detach().numpy(), **CLOSE)
    outcome = running.evaluate(data, data["y"])
    np.testing.assert_allclose(outcome.outputs["logits"], deployed(model, data).logits.detach().numpy(), **CLOSE)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_folded_it_takes_and_gives_the_same_arrays(
    precision: Any, table: tuple[nn.Module, Bundle], tmp_path: Path, run: Command
) -> None:
    _, bundle = table
    data = examples(40)
    np.savez(tmp_path / "data.npz", **data)
    dataset = open_data(tmp_path / "data.npz", bundle.manifest)
    path = tmp_path / "model.onnx"
    fold(bundle, read_weights(bundle.file(WEIGHTS)), path, precision=precision, data=dataset, max_drop=100)
    ended = run("predict", path, "--data", tmp_path / "data.npz", "-o", tmp_path / "p.npz", "--json")
    assert ended.code == 0, ended.err
    torch.manual_seed(0)
    expected = deployed(Table(), data)
    with np.load(tmp_path / "p.npz") as predictions:
        assert sorted(predictions) == ["features", "logits", "predicted"]
        tolerance = {"float32": 1e-5, "float16": 3e-3, "int8": 0.1}[precision]
        for name, value in (("features", expected.features), ("logits", expected.logits)):
            error = np.linalg.norm(predictions[name] - value.detach().numpy()) / value.norm().item()
            assert error <= tolerance, name
    shown = run("inspect", path, "--json").json
    assert [array["name"] for array in shown["inputs"]] == ["signal", "day", "valid"]
    assert [array["name"] for array in shown["others"]] == ["features"]


def test_the_manifest_says_what_the_model_takes(table: tuple[nn.Module, Bundle]) -> None:
    _, bundle = table
    manifest = json.loads(bundle.file(MANIFEST).read_text())
    assert manifest["schema"] == 2
    assert not {"input", "label", "output", "loss"} & manifest.keys()
    assert bundle.interface.inputs == (
        ArraySpec("signal", (3, 8), "float32"),
        ArraySpec("day", (), "int64", 7),
        ArraySpec("valid", (8,), "bool"),
    )
    assert [output.name for output in bundle.interface.outputs] == ["logits", "features"]
    assert Interface.from_json(manifest, first=False) == bundle.interface


def test_class_names_are_kept_and_as_many_as_classes() -> None:
    spec = ArraySpec("y", (), "int64", 2, ("cat", "dog"))
    assert ArraySpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert "class_names" not in ArraySpec("y", (), "int64", 2).to_json()
    with pytest.raises(ValueError, match="3 names of 2 classes"):
        ArraySpec("y", (), "int64", 2, ("cat", "dog", "owl"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data.pop("day"), "expected arrays named 'signal', 'day', 'valid' and 'y', found 'signal'"),
        (lambda data: data.update(valid=data["valid"].astype(int)), "array 'valid': expected bool, found int64"),
        (
            lambda data: data.update(day=data["day"] + 1),
            r"array 'day', row \d+: expected integers in \[0, 7\), found 7",
        ),
        (
            lambda data: data.update(day=data["day"][:5]),
            "expected as many rows in 'signal' as in 'day', found 20 and 5",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    spoil: Any, words: str, table: tuple[nn.Module, Bundle], tmp_path: Path
) -> None:
    data = examples(20)
    spoil(data)
    np.savez(tmp_path / "data.npz", **data)
    with pytest.raises(InputError, match=words):
        open_data(tmp_path / "data.npz", table[1].manifest)


def test_an_engine_needs_every_array(table: tuple[nn.Module, Bundle]) -> None:
    data = examples(4)
    running = open_engine(table[1], "onnxruntime", threads=1)
    with pytest.raises(InputError, match="expected arrays by name, found none of 'day', 'valid'; pass them in a dict"):
        running.evaluate(data["signal"], data["y"])


def test_outputs_have_names() -> None:
    x = torch.zeros(1)
    assert dict(named_outputs(x)) == {"logits": x}
    assert [name for name, _ in named_outputs((x, (x, x), None))] == ["output_0", "output_1_0", "output_1_1"]
    assert [name for name, _ in named_outputs({"a": x, "b": {"c": x}})] == ["a", "b_c"]
    assert [name for name, _ in named_outputs(Result(x, x, (x,)))] == ["logits", "features", "attentions_0"]
    assert list(named_outputs(3)) == []


class Clash(nn.Module):
    def forward(self, x: torch.Tensor, seed: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"one": x * self.a, "two": seed * self.a}

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input": INPUTS, "input_shape": (3,)}, "input_shape: expected with one input alone, found beside 'signal'"),
        ({"input": INPUTS, "std": (2.0,)}, "std: expected with one input alone"),
        ({"input": ("x", "x:shape=3")}, "input: expected different names, found x, x"),
        (
            {"input": ("x:size=3",)},
            "input: x: size: expected an option of it, found an unknown one; it has shape, dtype",
        ),
        ({"input": ("x:dtype=int64",)}, "input: x: tokens: expected with dtype int64 and only then, found None"),
        ({"input": ("x:dtype=bool,mean=1",)}, "input: x: mean and std: expected none for bool input"),
        ({"input": ("x:shape=3,mean=1,2",)}, "input: x: mean: expected 1 number or 3"),
        ({"input": ("3:shape=3",)}, "input: expected the name of an argument of the model"),
        ({"input": ("x:shape=3", "seed:shape=3")}, "model: expected one output of floating numbers, found one, two;"),
        ({"input": ("x:shape=3", "seed:shape=3"), "output_name": ("three",)}, "output_name: expected one of one, two"),
        ({"input": ("x:shape=3", "seed:shape=3"), "output_name": ("one",)}, "'seed': expected another name than those"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_bundle(Clash(), tmp_path / "bundle", ExportConfig(**options))
    assert str(caught.value).startswith(words)


def test_a_model_of_one_input_is_written_for_older_releases(small_bundle: Any) -> None:
    manifest = json.loads(small_bundle().file(MANIFEST).read_text())
    assert manifest["schema"] == 1
    assert manifest["input"] == {"name": "x", "shape": [1, 8, 8], "dtype": "float32", "classes": None}
    assert (manifest["output"]["name"], manifest["label"]["classes"], manifest["loss"]) == (
        "logits",
        5,
        "cross_entropy",
    )


def test_a_manifest_of_another_schema_is_refused_by_name(table: tuple[nn.Module, Bundle], tmp_path: Path) -> None:
    data = json.loads(table[1].file(MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**data, "schema": 1}))
    with pytest.raises(WrongBundleError, match="expected the fields of schema 1, found no field 'input'"):
        open_bundle(tmp_path)


def test_several_arrays_are_split_and_trained(table: tuple[nn.Module, Bundle], tmp_path: Path, run: Command) -> None:
    data, bundle = examples(60), table[1]
    np.savez(tmp_path / "all.npz", **data)
    names = ("--train", "signal,y", "--further", "day", "--further", "valid", "--clients", "3", "--test-share", "0.2")
    ended = run("split", tmp_path / "all.npz", "-o", tmp_path / "clients", *names)
    assert ended.code == 0, ended.err
    found = [np.load(path) for path in sorted((tmp_path / "clients").glob("t*/*.npz"))]
    assert [sorted(each) for each in found] == [sorted(data)] * 6
    for name, array in data.items():
        parts = np.concatenate([each[name] for each in found])
        assert parts.dtype == array.dtype
        np.testing.assert_array_equal(np.sort(parts.ravel()), np.sort(array.ravel()))
    ended = run(
        *("train", bundle.path, "--weights", bundle.file(WEIGHTS), "--state", tmp_path / "state"),
        *("--data", tmp_path / "clients" / "train" / "client-0.npz", "-o", tmp_path / "u.safetensors"),
    )
    assert ended.code == 0, ended.err
