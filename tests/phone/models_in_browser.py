"""Models of the zoo train in a real browser as they do in Python, as near as engines come that round differently."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated_phone import Phone, ask, collecting
from norms import relative_error
from phone_kinks import change_in, native, write_data

from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import read_weights


@pytest.mark.parametrize(
    ("model", "batch", "steps", "tolerance"),
    [
        ("char-lstm", 8, 5, 1e-5),
        ("resnet18", 8, 1, 5e-4),
    ],
)
def test_a_model_of_the_zoo(model: str, batch: int, steps: int, tolerance: float, page: Path, tmp_path: Path) -> None:
    settings = {"batch_size": batch, "lr": 0.05, "seed": 1}
    with collecting(page, tmp_path, name=model) as (site, bundle):
        ask(site, settings)
        data, update = tmp_path / "data.npz", tmp_path / "update.safetensors"
        write_data(data, bundle.interface.inputs[0].shape, steps * batch)
        Phone(tmp_path / "profile", data, site.url).do(
            ("tap", "start"), ("until", "done"), ("tap", "send"), ("untilStatus", "Sent")
        )
        update.write_bytes(site.updates[-1])
    weights = read_weights(bundle.file(WEIGHTS), bundle)
    expected = native(bundle, tmp_path, weights, "native", settings)
    assert relative_error(change_in(update, weights), expected) < tolerance
    losses = []
    for path in (update, tmp_path / "native.update"):
        opened = open_update(path, weights)
        opened.close()
        assert opened.header.steps == steps
        losses.append(opened.header.metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
