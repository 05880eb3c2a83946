"""Which tensors stay on a device."""

import pytest
import small_round

from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.factors.roles import keep_personal

PFEDPARA = {"own.x2", "own.y2"}


def personal(*patterns: str) -> set[str]:
    kept = keep_personal(small_round.LAYOUT, patterns)
    assert kept.layers == small_round.LAYOUT.layers
    assert [(t.name, t.shape) for t in kept.tensors] == [(t.name, t.shape) for t in small_round.LAYOUT.tensors]
    frozen = {tensor.name for tensor in kept.with_role("frozen")}
    assert frozen == {tensor.name for tensor in small_round.LAYOUT.with_role("frozen")}
    return {tensor.name for tensor in kept.with_role("personal")}


def test_patterns_are_of_layers_or_tensors() -> None:
    assert personal() == PFEDPARA
    assert personal("head") == personal("head*") == personal("head.*") == PFEDPARA | {"head.weight", "head.bias"}
    assert personal("*.bias") == PFEDPARA | {f"{layer}.bias" for layer in ("conv", "fc", "own", "head")}
    assert personal("fc.x?", "scale") == PFEDPARA | {"fc.x1", "fc.x2", "scale"}
    assert personal("own.x2") == PFEDPARA
    assert keep_personal(small_round.LAYOUT, ()) == small_round.LAYOUT


@pytest.mark.parametrize("pattern", ["heads", "steps", "Head"])
def test_a_pattern_that_matches_nothing_trained_is_refused(pattern: str) -> None:
    with pytest.raises(
        InputError, match=f"personal: expected patterns of layers or trained tensors, found '{pattern}'"
    ):
        personal("head", pattern)


def test_something_must_travel() -> None:
    with pytest.raises(InputError, match="expected a tensor left to travel, found all personal"):
        personal("*")


def test_a_layer_that_stays_is_not_compared() -> None:
    from fedpara_edge.aggregation.gap import GapEstimator

    layout: Layout = keep_personal(small_round.LAYOUT, ("fc",))
    estimator = GapEstimator(layout, small_round.random_tensors(layout, 1), updates=1)
    result = estimator.result(small_round.flat(small_round.random_tensors(layout, 2)))
    assert result is not None
    assert [layer.layer for layer in result.layers] == ["conv", "own"]
