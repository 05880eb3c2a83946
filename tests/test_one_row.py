"""A batch of one row, as the last of an epoch may be, keeps its axis whatever a model squeezes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device_runtime.engines.registry import open_engine
from export import export_bundle
from export.comparison import TOLERANCE
from fedpara_edge.formats.bundle import ENGINES, WEIGHTS
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights


class Squeezed(nn.Module):
    """A convolution, a mean over the images, a squeeze, and a linear layer."""

    def __init__(self, squeeze: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.squeeze, self.head = nn.Conv2d(1, 8, 3, padding=1), squeeze, nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.squeeze(F.adaptive_avg_pool2d(torch.tanh(self.conv(x)), 1)))


@pytest.mark.parametrize(
    "squeeze",
    [
        lambda x: x.squeeze(),
        lambda x: x.squeeze(3).squeeze(-1),
        lambda x: x.squeeze((0, 2, 3)),
        lambda x: x.squeeze(0).squeeze((1, 2, 3)),
    ],
    ids=["all axes", "one axis", "some axes", "the batch's axis"],
)
def test_a_row_alone_trains_as_among_others(squeeze: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = ExportConfig(name="squeezed", input_shape=(1, 6, 6), input_dtype="float32")
    bundle, verification = export_bundle(Squeezed(squeeze), tmp_path / "bundle", options)
    assert max(errors.worst for errors in verification.values()) <= TOLERANCE
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((1, 1, 6, 6), np.float32), np.array([3])
    for name in ENGINES:
        engine = open_engine(bundle, name, threads=1)
        initial = read_weights(bundle.file(WEIGHTS)).tensors
        steps = []
        for rows in (1, 2):
            engine.load(initial)
            assert engine.evaluate(x.repeat(rows, 0), y.repeat(rows)).outputs["logits"].shape == (rows, 5)
            loss = engine.step(x.repeat(rows, 0), y.repeat(rows), learning_rate=0.1, seed=0)
            steps.append((loss, engine.read()))
        assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-6)
        for tensor, value in steps[0][1].items():
            np.testing.assert_allclose(value, steps[1][1][tensor], rtol=1e-5, atol=1e-7)
