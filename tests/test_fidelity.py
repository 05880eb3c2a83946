"""How far fitted factors are from the pretrained model, on examples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Command
from torch import nn

from export.exporter import deploy
from export.fidelity import Fidelity, compare_fit
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.interface import ArraySpec, Head, Interface
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.losses import find_loss
from fedpara_edge.nn import convert, mlp

CONFIG = ExportConfig(name="test", input_shape=(20,), mean=(1.0,), std=(2.0,))
INTERFACE = Interface(
    inputs=(ArraySpec("x", (20,), "float32"),),
    heads=(Head(ArraySpec("logits", (4,), "float32"), ArraySpec("y", (), "int64", 4), find_loss("cross_entropy")),),
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Dropout(0.5), nn.ReLU(), nn.Linear(40, 4))


def compared(gamma: float, rows: int = 700, new: str | None = None, *, labelled: bool = True) -> Fidelity:
    dense = net()
    fitted, _ = convert(dense, Factorization(gamma=gamma), pretrained=True)
    x = np.random.default_rng(0).standard_normal((rows, 20), np.float32)
    with torch.no_grad():
        y = dense.eval()((torch.from_numpy(x) - 1) / 2).argmax(1).numpy()
    examples = {"x": x, **({"y": y} if labelled else {})}
    found = compare_fit(deploy(fitted, CONFIG), deploy(dense, CONFIG), INTERFACE, examples, new=new)
    assert found is not None
    return found


def test_an_equal_model_is_at_no_distance() -> None:
    dense, x = net(), np.ones((5, 20), np.float32)
    same = compare_fit(deploy(dense, CONFIG), deploy(dense, CONFIG), INTERFACE, {"x": x})
    assert same is not None
    assert (same.error, same.examples, same.accuracy) == (0, 5, None)


def test_more_factors_are_nearer() -> None:
    near, far = compared(1.0), compared(0.0)
    assert 0 < near.error < far.error < 1
    assert near.examples == 512
    assert near.dense_accuracy == far.dense_accuracy == 1
    assert near.accuracy is not None
    assert far.accuracy is not None
    assert 0.5 < far.accuracy < near.accuracy < 1
    assert str(near).startswith("fitted: outputs within 0.")
    assert str(near).endswith("dense 100.00%")


def test_what_a_new_head_sees() -> None:
    found = compared(0.5, rows=9, new="3")
    assert (found.module, found.examples, found.accuracy) == ("3", 9, None)
    assert 0 < found.error < compared(0.0, rows=9, new="3").error
    assert str(found).startswith("fitted: inputs of the new '3' within 0.")


def test_a_new_module_that_is_never_called_says_nothing() -> None:
    dense = net()
    dense.register_module("unused", nn.Linear(3, 3))
    dense.forward = nn.Sequential(*list(dense)[:4]).forward  # type: ignore[method-assign]
    assert (
        compare_fit(
            *(deploy(dense, CONFIG) for _ in "ab"), INTERFACE, {"x": np.ones((2, 20), np.float32)}, new="unused"
        )
        is None
    )


def test_without_labels_there_is_no_accuracy() -> None:
    assert compared(0.5, labelled=False).accuracy is None


@pytest.mark.slow
@pytest.mark.parametrize("new", [(), ("--new-head", "head")])
def test_export_reports_it(new: tuple[str, ...], run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(mlp(kind="dense").state_dict(), "dense.pt")
    x = np.random.default_rng(0).integers(0, 256, (30, 1, 28, 28)).astype(np.uint8)
    np.savez("data.npz", x=x, y=np.arange(30) % 10)
    found = run(
        *("export", "mlp", "-o", "bundle", "--engines", "onnxruntime", "--pretrained", "dense.pt"),
        *("--example", "data.npz", "--json", *new),
    )
    assert found.code == 0, found.err
    fidelity = found.json["fidelity"]
    assert fidelity["module"] == ("head" if new else None)
    assert (fidelity["accuracy"] is None) == bool(new)
    assert 0 < fidelity["error"] < 1.5
    assert fidelity["examples"] == 30
