"""The attacks of the benchmark are those of their papers, and its table is what its code gives."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from norms import relative_error
from small_round import LAYOUT, flat, random_tensors, start_round

from fedpara_edge.factors.compose import compose
from fedpara_edge.formats.weights import Weights

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The modules of the benchmark, by name."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCHMARKS))
        import adversaries
        import attack_report
        import attacks

        yield {module.__name__: module for module in (adversaries, attack_report, attacks)}
        for name in ("adversaries", "attack_report", "attacks", "parts"):
            patched.delitem(sys.modules, name)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return start_round(tmp_path)


HONEST = [random_tensors(LAYOUT, seed, 0.1) for seed in range(7)]
OWN = random_tensors(LAYOUT, 9, 0.1)
ROWS = np.stack([flat(change) for change in HONEST])
FORMULAS = {
    "sign-flip": -flat(OWN),
    "scaling": -10 * flat(OWN),
    "alie": ROWS.mean(axis=0) - 1.5 * np.sqrt(np.square(ROWS - ROWS.mean(axis=0)).sum(axis=0) / 6),
    "ipm": -0.1 * ROWS.mean(axis=0),
    "label-flip": flat(OWN),
    "impersonate": -flat(OWN),
}
"""What a hostile client sends, for each attack that is a formula."""


def crafted(modules: dict[str, ModuleType], name: str, weights: Weights, seed: int = 0) -> Any:
    adversaries = modules["adversaries"]
    scene = adversaries.Scene(honest=HONEST, own=OWN, weights=weights, random=np.random.default_rng(seed))
    return adversaries.ATTACKS[name].craft(scene)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_attack_is_its_formula(name: str, modules: dict[str, ModuleType], weights: Weights) -> None:
    sent = crafted(modules, name, weights)
    assert {tensor.dtype for tensor in sent.values()} == {np.dtype(np.float32)}
    assert flat(sent) == pytest.approx(FORMULAS[name], rel=1e-6, abs=1e-7)


def test_every_attack_is_tested(modules: dict[str, ModuleType]) -> None:
    assert {*FORMULAS, "gaussian", "gauge"} == set(modules["adversaries"].ATTACKS)


def test_inner_product_manipulation_is_nearer_to_the_honest_than_these_to_another() -> None:
    apart = [np.linalg.norm(one - other) for k, one in enumerate(ROWS) for other in ROWS[:k]]
    assert max(np.linalg.norm(ROWS - FORMULAS["ipm"], axis=1)) < min(apart)


def test_gaussian_noise_comes_from_the_seed(modules: dict[str, ModuleType], weights: Weights) -> None:
    one, again, other = (flat(crafted(modules, "gaussian", weights, seed)) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).all()
    assert one.std() == pytest.approx(1, rel=4 / np.sqrt(2 * one.size))


def test_another_gauge_has_the_same_weights_and_ruins_a_mean(modules: dict[str, ModuleType], weights: Weights) -> None:
    sent = crafted(modules, "gauge", weights)
    for share, kept in ((1.0, 1.0), (0.3, 0.4**4)):  # each of two terms is (1 - 2 share)² of itself
        for layer in (layer for layer in LAYOUT.layers if layer.kind == "fedpara"):
            parts = {part: tensor.name for part, tensor in LAYOUT.parts(layer).items() if part[:1] in "txy"}
            base = {part: weights.tensors[name].astype(np.float64) for part, name in parts.items()}
            moved = {part: base[part] + share * sent[name] for part, name in parts.items()}
            before, after = compose(layer, base, np.tanh), compose(layer, moved, np.tanh)
            assert relative_error(after, kept * before) < 1e-6


@pytest.mark.slow
def test_the_table_is_what_the_code_gives(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    attacks = modules["attacks"]
    text = (BENCHMARKS / "attacks.md").read_text(encoding="utf-8")
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    federation = attacks.Federation(tmp_path)
    assert set(attacks.RULES) <= rows.keys()
    worst = text[: text.index("\n## ")]
    (none,) = (line.split(" | ")[1] for line in worst.splitlines() if line.startswith("| mean |"))
    found = attacks.measure(lambda: federation, "mean", 0.0)["none"]
    assert 100 * found == pytest.approx(float(none), abs=1)  # of 2000 images; kernels differ between processors


@pytest.mark.slow
def test_signatures_turn_impersonation_into_what_a_client_sends_under_its_own_name(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = modules["attacks"]
    monkeypatch.setattr(attacks, "COLUMNS", ("sign-flip", "impersonate", attacks.SIGNED))
    federation = attacks.Federation(tmp_path, rounds=2)
    found = attacks.measure(lambda: federation, "mean", 0.1)
    assert found[attacks.SIGNED] == found["sign-flip"] > 0.5 > 0.2 > found["impersonate"]


RESULTS = {
    "mean, 0%, seed 0": {"none": 0.75},
    "mean, 10%, seed 0": {"ipm": 0.7, "impersonate": 0.1, "impersonate, signed": 0.65},
    "median, 0%, seed 0": {"none": 0.72},
    "median, 10%, seed 0": {"ipm": 0.5, "impersonate": 0.1, "impersonate, signed": 0.7},
}


def test_the_tables_and_the_figure_show_the_results(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    report = modules["attack_report"]
    text = report.report(RESULTS)
    assert "| mean | 75.0 | 65.0 |" in text  # not the 10 % that signatures stop
    assert "| median | 72.0 | 50.0 |" in text
    assert "## 10 % hostile" in text
    assert "| median | 50.0 | 10.0 | 70.0 |" in text
    report.draw(RESULTS, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert report.TITLE in drawn
    shades = [float(shade) for shade in re.findall(r"fill: #0072b2; opacity: ([\d.]+)", drawn)]
    shown = (0.75, 0.7, 0.65, 0.72, 0.5, 0.7)  # but for those at chance, which are blank
    assert shades == pytest.approx([(accuracy - 0.1) / 0.9 for accuracy in shown], abs=1e-5)


def test_several_seeds_are_means_with_their_spread(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    report = modules["attack_report"]
    again = {
        part.replace("seed 0", "seed 1"): {**found, "ipm": 0.2} for part, found in RESULTS.items() if "10%" in part
    }
    text = report.report({**RESULTS, **again})
    assert "| mean | 75.0 | 45.0 ± 35.4 |" in text
    assert "| median | 35.0 ± 21.2 | 10.0 ± 0.0 | 70.0 ± 0.0 |" in text
    report.draw({**RESULTS, **again}, tmp_path / "figure.svg")
    assert "35" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
