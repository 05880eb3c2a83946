"""Dropout in the step as plain ONNX: from a seed, apart by layer, by the mode of its module, and in attention."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from step_models import VECTOR, batch, export, run
from torch import nn
from torch.nn import functional as F

from export import export_bundle
from export.step.dropout import LIMIT
from fedpara_edge.formats.recipe import ExportConfig


class Offset(nn.Module):
    """Its gradient by `bias` is the mask of the dropout."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.bias, self.ratio = nn.Parameter(torch.zeros(40, 50)), ratio

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x + self.bias, self.ratio, self.training)


def masks(folder: Path, ratio: float, *seeds: int) -> list[np.ndarray]:
    options = ExportConfig(
        name="mask", input_shape=(40, 50), input_dtype="float32", loss="mse", engines=("onnxruntime",)
    )
    bundle, _ = export_bundle(Offset(ratio), folder / str(ratio), options)
    x, y = np.ones((1, 40, 50), np.float32), np.zeros((1, 40, 50), np.float32)
    return [run(bundle, x, y, seed=np.int64(seed))["gradient"] * 1000 for seed in seeds]  # 2 m² / 2000, m the mask


def test_dropout_draws_by_the_seed(tmp_path: Path) -> None:
    first, again, *others = masks(tmp_path, 0.3, 5, 5, 6, 5 + 2**32, 2**63 - 1)
    np.testing.assert_array_equal(first, again)
    kept = [mask > 0 for mask in (first, *others)]
    for index, mask in enumerate(kept):
        assert abs(mask.mean() - 0.7) < 0.04  # four standard deviations of 2000 draws
        for other in kept[:index]:
            assert abs((mask & other).mean() - 0.49) < 0.045
    np.testing.assert_allclose(first[first > 0], 1 / 0.7**2, rtol=1e-5)
    rows = kept[0].reshape(40, 50).astype(float) - 0.7
    assert abs((rows[:, 1:] * rows[:, :-1]).mean()) < 0.02  # neighbours are independent


def test_dropout_layers_draw_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(400, 5))
    bundle = export(model, tmp_path, (400,))
    x, y = np.ones((1, 400), np.float32), np.zeros(1, np.int64)
    gradient = run(bundle, x, y, seed=np.int64(3))["gradient"][:2000].reshape(5, 400)[0]
    assert abs((gradient != 0).mean() - 0.25) < 0.09  # the same mask twice would keep half


def test_dropout_follows_the_mode_of_its_module(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 5))
    model[0].eval()
    options = ExportConfig(name="test", input_shape=VECTOR, input_dtype="float32")
    bundle, _ = export_bundle(model, tmp_path / "eval", options)
    x, y = batch(VECTOR, 6)
    losses = {float(run(bundle, x, y, seed=np.int64(seed))["loss"]) for seed in range(3)}
    assert len(losses) == 1
    bundle, _ = export_bundle(model.eval(), tmp_path / "train", options)  # a model is trained in training mode
    losses = {float(run(bundle, x, y, seed=np.int64(seed))["loss"]) for seed in range(3)}
    assert len(losses) == 3


@pytest.mark.slow
def test_dropout_of_attention_is_in_both_engines(tmp_path: Path) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True), nn.Flatten())
    options = ExportConfig(name="test", input_shape=(3, 8), input_dtype="float32", loss="mse")
    bundle, _ = export_bundle(model, tmp_path / "bundle", options)
    theirs = [n for n in onnx.load(bundle.file("training_model.onnx")).graph.node if n.op_type.endswith("Dropout")]
    ours = [t for t in onnx.load(bundle.file("train_step.onnx")).graph.initializer if t.name.endswith(LIMIT)]
    assert len(theirs) == len(ours) == 4
    assert all(len(node.input) > 2 and node.input[-1] for node in theirs)
