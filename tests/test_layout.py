"""What a model consists of."""

import json
from typing import Any

import pytest
import small_round

from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import LayerSpec, Layout, TensorSpec


def test_json_and_back_is_the_identity() -> None:
    assert Layout.from_json(json.loads(json.dumps(small_round.LAYOUT.to_json()))) == small_round.LAYOUT


TENSOR = {"name": "a", "shape": [2], "dtype": "float32", "layer": "", "part": "other", "role": "shared"}
LAYER = {"name": "fc", "operator": "linear", "kind": "fedpara", "form": "matrix", "shape": [4, 3], "rank": 2}


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


@pytest.mark.parametrize(
    "shape", [[[1]], 2, "2", {"2": 1}, [-1], [1.0], [True], ["2"], [1 << 70], [1 << 31] * 2, [1] * 33]
)
def test_a_shape_is_a_list_of_natural_numbers(shape: Any) -> None:
    assert Layout.from_json({"layers": [LAYER], "tensors": [TENSOR]}).tensors[0].shape == (2,)
    for data in (
        {"layers": [], "tensors": [{**TENSOR, "shape": shape}]},
        {"layers": [{**LAYER, "shape": shape}], "tensors": []},
    ):
        refused(data)


@pytest.mark.parametrize("value", [5, None, ["a"], {}, "\ud800", "x\n" * 100_000], ids=lambda value: ascii(value)[:20])
def test_every_text_is_text(value: Any) -> None:
    whole = isinstance(value, str) and value.isascii()  # then a name, only no part or role
    for key in ("part", "role") if whole else ("name", "dtype", "layer", "part", "role"):
        refused({"layers": [], "tensors": [{**TENSOR, key: value}]})
    for key in ("operator", "kind", "form") if whole else ("name", "operator", "kind", "form"):
        refused({"layers": [{**LAYER, key: value}], "tensors": []})
    refused({"layers": [], "tensors": [{**TENSOR, "x\n": value}]})


@pytest.mark.parametrize(
    "data",
    [
        {"layers": [], "tensors": [TENSOR, TENSOR]},
        {"layers": [LAYER, LAYER], "tensors": []},
        {"layers": [{**LAYER, "rank": 2.0}], "tensors": []},
        {"layers": [{**LAYER, "rank": True}], "tensors": []},
        {"layers": [{**LAYER, "tanh": 1}], "tensors": []},
    ],
)
def test_names_are_unique_and_numbers_whole(data: Any) -> None:
    refused(data)


def refused(data: Any) -> None:
    with pytest.raises(InputError) as caught:
        Layout.from_json(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


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
