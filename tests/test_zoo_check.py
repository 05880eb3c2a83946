"""A sample of the zoo check: architectures that were once refused for rounding, and some of each kind of layer."""

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SAMPLE = ("InstanceNorm CNN", "CNN with GroupNorm", "DLinear", "tabular MLP", "FT-Transformer", "bag of words")


@pytest.fixture(scope="module")
def zoo_check() -> Any:
    """The module of the benchmark."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCHMARKS))
        import zoo_check

        yield zoo_check
        for name in [name for name in sys.modules if name.partition(".")[0] in ("zoo_check", "architectures", "parts")]:
            patched.delitem(sys.modules, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_verified_and_trains_as_in_torch(name: str, zoo_check: Any) -> None:
    rows = zoo_check.check(zoo_check.ARCHITECTURES[name], seed=0)  # where no rectifier is within rounding of zero
    assert {row["engine"] for row in rows} == {"ort-training", "onnxruntime"}
    for row in rows:
        assert "refused" not in row, row
        assert row["error"] <= row["limit"]
        assert row["trained"] <= max(1e-5, 10 * row["torch"])
    table = zoo_check.report({f"{name}, seed 0": rows}).splitlines()
    assert table[2].startswith(f"| {name} | onnxruntime | 1 of 1 |")
    assert len(table) == 4


def test_a_refusal_is_noted(zoo_check: Any) -> None:
    refused = [{"engine": "onnxruntime", "refused": "expected this, found that"}]
    text = zoo_check.report({"GPT, seed 0": refused, "GPT, seed 1": refused})
    assert "| GPT | onnxruntime | 0 of 2, refused [1] | - | - | - | - | - |" in text
    assert text.endswith("1. GPT, onnxruntime: expected this, found that")


def test_there_are_forty_architectures_by_different_names(zoo_check: Any) -> None:
    assert len(zoo_check.ARCHITECTURES) >= 40
