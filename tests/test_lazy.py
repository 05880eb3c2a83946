"""Lazy modules in models to export: their weights take the shapes that the declared input gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from export.build import factored_model
from fedpara_edge.errors import InputError
from fedpara_edge.formats.recipe import Recipe

LAZY = """
from torch import nn

def lazy():
    return nn.Sequential(nn.LazyConv2d(16, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10))

def plain():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 6 * 6, 10))
"""


def recipe(folder: Path, factory: str, shape: tuple[int, ...]) -> Recipe:
    (folder / "models.py").write_text(LAZY)
    return Recipe(name=f"{folder / 'models.py'}:{factory}", input_shape=shape, batchnorm="train", seed=4)


def test_they_are_factored_as_if_their_shapes_had_been_given(tmp_path: Path) -> None:
    lazy, plain = (factored_model(recipe(tmp_path, factory, (3, 8, 8))) for factory in ("lazy", "plain"))
    assert [layer.spec for layer in lazy.report.layers] == [layer.spec for layer in plain.report.layers]
    found, expected = (made.converted.state_dict() for made in (lazy, plain))
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}


def test_their_weights_come_from_the_seed_and_their_statistics_from_no_example(tmp_path: Path) -> None:
    one, other = (factored_model(recipe(tmp_path, "lazy", (3, 8, 8))).dense for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    norm = one[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.training
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    assert (norm.running_var == 1).all()


def test_a_shape_that_they_do_not_take_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected to take .*\[1, 8\], found .*; check --input-shape"):
        factored_model(recipe(tmp_path, "lazy", (8,)))
