"""Starting from weights that were trained dense: read without running code, and fitted by the factors."""

import os
from pathlib import Path

import pytest
import torch
from command_line import Command
from safetensors.torch import save_file
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.nn import convert, load_pretrained, mlp


def dense_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_state_dict_is_loaded(suffix: str, tmp_path: Path) -> None:
    source, target = dense_net(), dense_net()
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    load_pretrained(target, path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def broken(path: Path) -> None:
    path.write_bytes(b"nothing of the kind")


BAD = {
    "missing": (lambda _: None, "expected a file with a state_dict, found none"),
    "broken": (broken, "expected a state_dict"),
    "code": (lambda path: torch.save({"0.weight": Runs()}, path), "expected a state_dict"),
    "list": (lambda path: torch.save([torch.zeros(1)], path), "expected a state_dict, found list"),
    "other names": (
        lambda path: torch.save({"1.weight": torch.zeros(1)}, path),
        "no such tensor among 1.weight",
    ),
    "other shape": (lambda path: torch.save(nn.Linear(6, 41).state_dict(), path), "tensor '0.bias'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_state_dict_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = BAD[name]
    path = tmp_path / "weights.pt"
    make(path)
    model = dense_net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load_pretrained(model, path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.slow
def test_fitted_model_is_closer_to_the_dense_one_than_a_fresh_one() -> None:
    torch.manual_seed(0)
    dense = mlp(kind="dense")
    x = torch.randn(64, 1, 28, 28)
    fitted, report = convert(dense, Factorization(gamma=0.8), pretrained=True)
    fresh, _ = convert(dense, Factorization(gamma=0.8))
    with torch.no_grad():
        expected = dense(x)
        errors = [(model(x) - expected).norm() / expected.norm() for model in (fitted, fresh)]
    assert errors[0] < 0.5 < 1.0 < errors[1]
    assert all(layer.relative_error is not None for layer in report.converted)


@pytest.mark.slow
def test_export_from_pretrained_weights(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dense = mlp(kind="dense")
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    found = run("export", "mlp", "-o", "bundle", "--pretrained", "dense.safetensors", "--gamma", "0.5", "--json").json
    hidden = next(layer for layer in found["layers"] if layer["name"] == "hidden")
    assert 0 < hidden["relative_error"] < 0.7
    tensors = read_weights(tmp_path / "bundle" / WEIGHTS).tensors
    assert (tensors["hidden.bias"] == dense.hidden.bias.detach().numpy()).all()
