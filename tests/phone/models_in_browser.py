"""Models of the zoo train in a real browser as they do in Python, as near as engines come that round differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emulated_phone import Phone, ask, collecting
from norms import relative_error
from phone_kinks import ExactSteps, change_in, native, write_data, write_untied_data
from phone_site import Site

from export.build import factored_model
from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import read_weights


def trained_in_browser(folder: Path, site: Site, settings: dict[str, Any]) -> Path:
    """The update of a phone with the examples in `data.npz`."""
    ask(site, settings)
    update = folder / "update.safetensors"
    Phone(folder / "profile", folder / "data.npz", site.url).do(
        ("tap", "start"), ("until", "done"), ("tap", "send"), ("untilStatus", "Sent")
    )
    update.write_bytes(site.updates[-1])
    return update


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
        write_data(tmp_path / "data.npz", bundle.interface.inputs[0].shape, steps * batch)
        update = trained_in_browser(tmp_path, site, settings)
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


def test_the_cnn_is_as_exact_as_in_python_where_nothing_nearly_ties(page: Path, tmp_path: Path) -> None:
    """What keeps either engine from double precision are maxima that nearly tie, and nothing else."""
    settings = {"batch_size": 32, "lr": 0.05, "seed": 1}
    with collecting(page, tmp_path, name="cnn") as (site, bundle):
        made = factored_model(Recipe(name="cnn", engines=("onnxruntime",)))
        exact = ExactSteps(made.converted, made.config, settings["lr"])
        write_untied_data(tmp_path / "data.npz", exact, settings, steps=5)
        update = trained_in_browser(tmp_path, site, settings)
    weights = read_weights(bundle.file(WEIGHTS), bundle)
    changes = change_in(update, weights), native(bundle, tmp_path, weights, "native", settings)
    for change in changes:
        assert relative_error(change, exact.change(bundle)) < 1e-5
    assert relative_error(*changes) < 1e-5
