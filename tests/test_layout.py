"""What a model consists of."""

import json
from typing import Any

import pytest
import small_round

from fedpara_edge.errors import InputError
from fedpara_edge.layout import LayerSpec, Layout, TensorSpec


def test_json_and_back_is_the_identity() -> None:
    assert Layout.from_json(json.loads(json.dumps(small_round.LAYOUT.to_json()))) == small_round.LAYOUT


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"layers": []},
        {"layers": 1, "tensors": []},
        {"layers": [], "tensors": [3]},
        {"layers": [], "tensors": [{"name": "a", "shape": [1]}]},
        {"layers": [], "tensors": [{"shape": [], "unknown": 1}]},
        {"layers": [{"shape": None}], "tensors": []},
    ],
    ids=str,
)
def test_other_json_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match="layout: expected the fields of this version"):
        Layout.from_json(data)


def test_roles() -> None:
    layout = small_round.LAYOUT
    assert {t.name for t in layout.with_role("personal")} == {"own.x2", "own.y2"}
    assert {t.name for t in layout.with_role("frozen")} == {"steps"}
    assert layout.shared == layout.with_role("shared")
    assert layout.with_role("shared", "personal", "frozen") == layout.tensors


def test_parts_of_a_layer() -> None:
    conv, _, own, head = small_round.LAYERS
    assert set(small_round.LAYOUT.parts(conv)) == {"x1", "y1", "t1", "x2", "y2", "t2", "bias"}
    assert small_round.LAYOUT.parts(own)["x2"].role == "personal"
    assert small_round.LAYOUT.parts(head)["weight"].shape == (3, 5)


def test_counts() -> None:
    conv = 2 * 2 * (4 + 3 + 2 * 9) + 4
    fully_connected = 2 * 2 * (6 + 5) + 6
    own = 2 * (5 + 6) + 5  # its second factors stay
    head = 3 * 5 + 3
    assert small_round.LAYOUT.shared_parameters == conv + fully_connected + own + head + 1
    dense = (4 * 3 * 9 + 4) + (6 * 5 + 6) + (5 * 6 + 5) + (3 * 5 + 3)
    assert small_round.LAYOUT.dense_parameters == dense + 1


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": (4,)},
        {"shape": (4, 0)},
        {"shape": (4, 3, 3, 3)},
        {"operator": "conv2d"},
        {"kind": "dense"},
        {"kind": "sparse"},
        {"rank": 0},
        {"rank": -1},
        {"form": "tensor"},
        {"kind": "lowrank", "tanh": True},
        {"kind": "pfedpara", "tanh": True},
    ],
    ids=str,
)
def test_impossible_layers_are_refused_by_name(changed: dict[str, Any]) -> None:
    fields = {"name": "fc", "operator": "linear", "kind": "fedpara", "form": "matrix", "shape": (4, 3), "rank": 2}
    LayerSpec(**fields)
    with pytest.raises(InputError, match="layer 'fc': "):
        LayerSpec(**{**fields, **changed})


@pytest.mark.parametrize("changed", [{"role": "public"}, {"part": "x3"}])
def test_impossible_tensors_are_refused_by_name(changed: dict[str, Any]) -> None:
    fields = {"name": "a", "shape": (), "dtype": "float32", "layer": "", "part": "other", "role": "shared"}
    assert TensorSpec(**fields).size == 1
    with pytest.raises(InputError, match="tensor 'a': "):
        TensorSpec(**{**fields, **changed})
