"""Stand-ins give onnxruntime-training the gradients that it lacks, and leave no trace of themselves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from step_models import SEQUENCE, VECTOR, Formula, batch
from torch import nn
from torch.nn import functional as F

from device_runtime.engines.registry import open_engine
from export import export_bundle
from export.standins import OPERATOR
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import ENGINES, Bundle
from fedpara_edge.formats.recipe import ExportConfig


class Tagger(nn.Module):
    """A bidirectional GRU over padded sequences, whose largest states are the input of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pad, self.gru, self.last = nn.ReplicationPad1d(2), nn.GRU(3, 4, bidirectional=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.pad(x).permute(2, 0, 1))
        return self.last(states.amax(0))


def export(model: nn.Module, folder: Path, shape: tuple[int, ...], engines: tuple[str, ...] = ENGINES) -> Bundle:
    torch.manual_seed(0)
    options = ExportConfig(name="test", input_shape=shape, input_dtype="float32", engines=engines)
    return export_bundle(model, folder / "bundle", options)[0]


def operators(bundle: Bundle, name: str) -> set[str]:
    return {node.op_type for node in onnx.load(bundle.file(name)).graph.node}


@pytest.mark.slow
def test_nothing_of_them_is_written_and_evaluation_keeps_the_nodes(tmp_path: Path) -> None:
    bundle = export(Tagger(), tmp_path, SEQUENCE, ("ort-training",))
    training, evaluation = (operators(bundle, f"{kind}_model.onnx") for kind in ("training", "eval"))
    assert OPERATOR not in training | evaluation
    assert {"Scan", "Pad", "ReduceMax"} <= training
    assert "GRU" not in training
    assert {"GRU", "ReduceMax"} <= evaluation
    assert "Scan" not in evaluation


def test_what_the_runtime_differentiates_is_left_to_it(tmp_path: Path) -> None:
    bundle = export(Formula(lambda x: x.relu() * F.pad(x, (1, 1))[:, 1:-1].softmax(1)), tmp_path, VECTOR)
    assert {"ReluGrad", "SoftmaxGrad_13", "SliceGrad"} <= operators(bundle, "training_model.onnx")


@pytest.mark.slow
def test_both_engines_take_the_same_steps(tmp_path: Path) -> None:
    bundle = export(Tagger(), tmp_path, SEQUENCE)
    weights = []
    for name in ENGINES:
        engine = open_engine(bundle, name)
        for seed in range(3):
            engine.step(*batch(SEQUENCE, 4 + seed), learning_rate=0.5, seed=seed)
        weights.append(engine.read())
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(tensor, weights[1][name], rtol=1e-4, atol=1e-6)


FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "largest": lambda x: x.amax(1, keepdim=True) * x,
    "smallest": lambda x: x.amin(1, keepdim=True) * x,
    "products": lambda x: x.view(-1, 3, 4).prod(1),
}


def test_one_export_does_not_take_the_gradients_of_another(tmp_path: Path) -> None:
    """The runtime never forgets what it has been told, and each of these models has the same names."""
    for name, formula in FORMULAS.items():
        (tmp_path / name).mkdir()
        export(Formula(formula), tmp_path / name, VECTOR, ("ort-training",))


def test_an_operator_without_a_rule_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^the model: expected operators with a gradient in onnxruntime-t.* found Mod,"
    ):
        export(Formula(lambda x: torch.fmod(x, 0.7)), tmp_path, VECTOR, ("ort-training",))
    pooled = nn.Sequential(nn.Linear(12, 12), nn.Unflatten(1, (1, 3, 4)), Folded(), nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(InputError, match=r"^module '2': .* found Col2Im, which has none"):
        export(pooled, tmp_path, VECTOR, ("ort-training",))


class Folded(nn.Module):
    """Patches put back in their places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.fold(F.unfold(x, 2), (3, 4), 2)
