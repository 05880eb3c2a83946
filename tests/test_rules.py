"""Robust rules: what the papers' formulas say, in plain numpy, and what every rule must obey.

The oracles are written from the formulas: f of n updates may be bad, and Krum has the n - f - 1 nearest others.
"""

import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_round import flat, forge, layer, layout_of, random_tensors, send, start_round

from fedpara_edge.aggregation import AggregateConfig, Aggregation, aggregate, columns
from fedpara_edge.aggregation.bounds import UNBOUNDED, Bounds
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.rules import MIXINGS, RULES, coordinates, find_mixing, find_rule, geometry
from fedpara_edge.aggregation.rules.coordinates import mean_of_ranks
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.aggregation.rules.rule import count_bad
from fedpara_edge.algorithms.scaffold import ScaffoldServer
from fedpara_edge.codecs import codec
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import compose_named, travelling
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights

Rows = NDArray[np.float64]


def bad_of(rows: Rows, share: float) -> int:
    return min(math.ceil(share * len(rows)), (len(rows) - 1) // 2)


def trimmed(rows: Rows, share: float = 0.2) -> Rows:
    f = bad_of(rows, share)
    return np.sort(rows, axis=0)[f : len(rows) - f].mean(axis=0)


def krum_scores(rows: Rows, share: float) -> Rows:
    distances = np.sort(((rows[:, None] - rows[None]) ** 2).sum(axis=2), axis=1)
    return distances[:, 1 : len(rows) - bad_of(rows, share)].sum(axis=1)


def krum(rows: Rows, share: float = 0.2) -> Rows:
    return rows[np.argmin(krum_scores(rows, share))]


def multi_krum(rows: Rows, share: float = 0.2) -> Rows:
    return rows[np.argsort(krum_scores(rows, share))[: len(rows) - bad_of(rows, share)]].mean(axis=0)


def clipped(rows: Rows, most: float) -> Rows:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.minimum(1, most / np.maximum(norms, 1e-300))


def norm_bounded(rows: Rows, norm: float = 1) -> Rows:
    return clipped(rows, norm * float(np.median(np.linalg.norm(rows, axis=1)))).mean(axis=0)


def centered_clipping(rows: Rows, radius: float = 1, iterations: int = 5) -> Rows:
    tau, v = radius * float(np.median(np.linalg.norm(rows, axis=1))), np.zeros(rows.shape[1])
    for _ in range(iterations):
        v = v + clipped(rows - v, tau).mean(axis=0)
    return v


def geometric_median(rows: Rows) -> Rows:
    least, v = 1e-6 * float(np.median(np.linalg.norm(rows, axis=1))), rows.mean(axis=0)
    for _ in range(100):
        weights = 1 / np.maximum(np.linalg.norm(rows - v, axis=1), least)
        v = weights @ rows / weights.sum()
    return v


def nearest_neighbours(rows: Rows, share: float = 0.2) -> Rows:
    distances = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    nearest = np.argsort(distances, axis=1)[:, : len(rows) - bad_of(rows, share)]
    return rows[nearest].mean(axis=1)


ORACLES: dict[str, Callable[[Rows], Rows]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "median": lambda rows: np.median(rows, axis=0),
    "trimmed": trimmed,
    "trimmed:share=0.4": lambda rows: trimmed(rows, 0.4),
    "geometric-median": geometric_median,
    "krum": krum,
    "krum:share=0.4": lambda rows: krum(rows, 0.4),
    "multi-krum": multi_krum,
    "multi-krum:share=0.4": lambda rows: multi_krum(rows, 0.4),
    "centered-clipping": centered_clipping,
    "centered-clipping:radius=0.3,iterations=2": lambda rows: centered_clipping(rows, 0.3, 2),
    "norm-bounded": norm_bounded,
    "norm-bounded:norm=0.5": lambda rows: norm_bounded(rows, 0.5),
}
EVERY = [*ORACLES, *(name for name in RULES if name not in ORACLES)]


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return start_round(tmp_path)


@pytest.fixture(params=["as they are", "small pieces", "many files"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as they are":
        monkeypatch.setattr(codec, "CHUNK_ENTRIES", 16)
        monkeypatch.setattr(columns, "PIECE_ENTRIES", 40)
        monkeypatch.setattr(coordinates, "WIDTH", 3)
        monkeypatch.setattr(geometry, "TILE", 5)
        monkeypatch.setattr(geometry, "ROWS_ENTRIES", 100)
    if request.param == "many files":
        monkeypatch.setattr(columns, "OPEN_FILES", 3)


def method(rule: str, mixing: str | None = None, **options: Any) -> Method:
    return Method(rule=find_rule(rule), mixing=None if mixing is None else find_mixing(mixing), **options)


def spread_updates(folder: Path, weights: Weights, count: int = 11, **options: Any) -> tuple[list[Path], Rows]:
    """Updates of different sizes, of which a few are far off."""
    changes = [random_tensors(weights.layout, k, 0.05 * (1 + k % 3) * (20 if k in (4, 7) else 1)) for k in range(count)]
    paths = [
        send(folder, weights, f"c{k:02}", change=each, metrics={"learning_rate_sum": 0.4 + 0.1 * (k % 4)}, **options)
        for k, each in enumerate(changes)
    ]
    return paths, np.stack([flat(each) for each in changes])


def moved(result: Aggregation, weights: Weights) -> Rows:
    return flat(result.weights.tensors) - flat(weights.tensors)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("text", EVERY)
def test_a_rule_is_what_its_formula_says(text: str, tmp_path: Path, weights: Weights) -> None:
    paths, rows = spread_updates(tmp_path, weights)
    result = aggregate(paths, weights, method=method(text), weighting="equal", bounds=UNBOUNDED)
    np.testing.assert_allclose(moved(result, weights), ORACLES[text](rows), atol=2e-6)


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_mixing_goes_before_a_rule(text: str, mixing: str, tmp_path: Path, weights: Weights) -> None:
    paths, rows = spread_updates(tmp_path, weights)
    if mixing == "nnm":
        mixed = nearest_neighbours(rows)
    else:
        matrix = find_mixing(mixing).matrix(np.zeros((len(rows), len(rows))), weights.base)
        assert sorted(np.flatnonzero(matrix.sum(axis=0))) == list(range(len(rows)))
        assert [np.count_nonzero(row) for row in matrix] == [2] * 5 + [1]
        mixed = matrix @ rows
    result = aggregate(paths, weights, method=method(text, mixing), bounds=UNBOUNDED)
    np.testing.assert_allclose(moved(result, weights), ORACLES[text](mixed), atol=2e-6)


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("mixing", [None, "nnm", "bucketing:size=3,seed=4"])
def test_the_order_of_the_files_changes_no_bit(text: str, mixing: str | None, tmp_path: Path, weights: Weights) -> None:
    paths, _ = spread_updates(tmp_path, weights, 7)
    bases = {
        aggregate(order, weights, method=method(text, mixing), effort=Effort(threads=threads)).weights.base
        for order, threads in ((paths, 2), (paths[::-1], 1), (paths[3:] + paths[:3], 3))
    }
    assert len(bases) == 1


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_equal_updates_give_that_update(text: str, count: int, tmp_path: Path, weights: Weights) -> None:
    change = random_tensors(weights.layout, 5, 0.1)
    paths = [send(tmp_path, weights, f"c{k}", change=change) for k in range(count)]
    for mixing in (None, "nnm", "bucketing"):
        result = aggregate(paths, weights, method=method(text, mixing))
        shrinks = text in ("norm-bounded:norm=0.5", "centered-clipping:radius=0.3,iterations=2")
        expected = flat(change) * {"n": 0.5, "c": 0.6}[text[0]] if shrinks else flat(change)
        np.testing.assert_allclose(moved(result, weights), expected, atol=1e-6)


@pytest.mark.parametrize("text", sorted(RULES.keys() - {"mean"}))
@pytest.mark.parametrize("mixing", [None, "nnm"])
def test_a_fifth_of_hostile_updates_hardly_moves_a_rule(
    text: str, mixing: str | None, tmp_path: Path, weights: Weights
) -> None:
    """Nearer to the mean of the honest than bounds alone bring it, in every rule."""
    common = random_tensors(weights.layout, 99, 0.1)
    honest = []
    for k in range(8):
        own = random_tensors(weights.layout, k, 0.03)
        honest.append({name: common[name] + own[name] for name in own})
    paths = [send(tmp_path, weights, f"c{k}", change=each) for k, each in enumerate(honest)]
    wrong = {name: np.float32(-10) * value for name, value in common.items()}
    paths += [send(tmp_path, weights, f"bad-{k}", change=wrong) for k in range(2)]
    aim = np.mean([flat(each) for each in honest], axis=0)

    def error(**options: Any) -> float:
        result = aggregate(paths, weights, **options)
        return float(np.linalg.norm(moved(result, weights) - aim) / np.linalg.norm(aim))

    robust, plain, bare = error(method=method(text, mixing)), error(), error(bounds=UNBOUNDED)
    assert robust < 0.45 < plain < bare


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("text", EVERY)
def test_bad_files_are_named_and_leave_no_trace(text: str, tmp_path: Path, weights: Weights) -> None:
    paths, _ = spread_updates(tmp_path, weights, 7)
    nothing = {name: np.full_like(value, np.inf) for name, value in weights.tensors.items()}
    bad = [forge(tmp_path / "inf", weights, tensors=nothing, client="c01b")]
    late = random_tensors(weights.layout, 3)
    late["scale"] = np.asarray(np.nan, np.float32)
    bad.append(forge(tmp_path / "late", weights, tensors=late, client="a"))
    result = aggregate([*bad, *paths], weights, method=method(text))
    alone = aggregate(paths, weights, method=method(text))
    assert [(update.path, update.code) for update in result.rejected] == [(path, "not_finite") for path in bad]
    assert "'scale'" in result.rejected[1].reason
    assert result.weights.base == alone.weights.base
    assert result.accepted == alone.accepted


@pytest.mark.parametrize("codec_name", ["int8", "rotated", "topk"])
def test_rules_read_encoded_updates(codec_name: str, tmp_path: Path, weights: Weights) -> None:
    paths, _ = spread_updates(tmp_path, weights, 5, codec=codec_name)
    rows = []
    for path in paths:
        update = open_update(path, weights)
        rows.append(decode_all(update.decoder, weights.layout.shared_parameters))
        update.close()
    for text in ("median", "multi-krum"):
        result = aggregate(paths, weights, method=method(text), bounds=UNBOUNDED)
        np.testing.assert_allclose(moved(result, weights), ORACLES[text](np.stack(rows).astype(np.float64)), atol=2e-6)


@pytest.mark.parametrize("text", ["median", "trimmed", "krum", "geometric-median"])
def test_bounds_come_before_a_rule(text: str, tmp_path: Path, weights: Weights) -> None:
    paths, rows = spread_updates(tmp_path, weights)
    norms = np.linalg.norm(rows, axis=1)
    scaled = rows * np.minimum(1, 2 * np.median(norms) / norms)[:, None]
    result = aggregate(paths, weights, method=method(text), bounds=Bounds(max_norm=2.0))
    np.testing.assert_allclose(moved(result, weights), ORACLES[text](scaled), atol=2e-6)
    assert [update.client for update in result.accepted if update.bounded] == ["c04", "c07"]


@pytest.mark.parametrize("text", ["median", "trimmed", "multi-krum"])
def test_every_mean_of_an_algorithm_goes_through_the_rule(text: str, tmp_path: Path) -> None:
    weights = start_round(tmp_path, number=0)
    paths, rows = spread_updates(tmp_path, weights)
    result = aggregate(paths, weights, algorithm=ScaffoldServer(clients=11), method=method(text), bounds=UNBOUNDED)
    sums = np.array([update.metrics["learning_rate_sum"] for update in result.accepted])[:, None]
    expected = -ORACLES[text](rows / sums)
    if text == "multi-krum":
        taken = np.array([update.share > 0 for update in result.accepted])
        expected = -(rows / sums)[taken].mean(axis=0)
    assert result.state is not None
    np.testing.assert_allclose(flat(result.state.groups["control"]), expected, atol=1e-5)


@given(st.integers(1, 40), st.sampled_from((3, coordinates.WIDTH)), st.data())
def test_the_mean_of_ranks_is_that_of_a_sort(count: int, width: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first + 1, count))
    rows = np.random.default_rng(count).integers(-5, 5, (count, 31)).astype(np.float32)
    expected = np.sort(rows, axis=0)[first:last].mean(axis=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinates, "WIDTH", width)
        np.testing.assert_allclose(mean_of_ranks(rows, first, last), expected, rtol=1e-6, atol=1e-6)


def test_the_mean_of_the_largest_numbers_there_are() -> None:
    largest = np.finfo(np.float32).max
    rows = np.array([[largest, 1], [largest, 2], [largest, 3], [largest, 4], [-largest, 5]], np.float32)
    np.testing.assert_allclose(mean_of_ranks(rows, 1, 4), [float(largest), 3], rtol=1e-7)
    np.testing.assert_allclose(mean_of_ranks(rows, 1, 5), [float(largest), 3.5], rtol=1e-7)


def rescaled(weights: Weights, factor: float) -> dict[str, NDArray[np.float32]]:
    """The change to factors that compose to the very same weights: X -> c X, Y -> Y / c."""
    change = {name: np.zeros_like(value) for name, value in weights.tensors.items()}
    for name, value in weights.tensors.items():
        part = name.rpartition(".")[2]
        if part in ("x1", "x2", "y1", "y2"):
            own = np.float32(factor if part[0] == "x" else 1 / factor)
            change[name] = (own - 1) * value
    return change


def test_another_scale_of_the_factors_fools_distances_between_factors_only(tmp_path: Path) -> None:
    """A client whose weights are the others' to the last digit looks far off, and one far off looks near."""
    weights = start_round(tmp_path, layout_of(layer("fc", (12, 10), rank=3), layer("conv", (8, 6, 3, 3), rank=3)))
    paths = []
    for k in range(6):
        own = random_tensors(weights.layout, k, 0.05)
        paths.append(send(tmp_path, weights, f"c{k}", change=own))
    paths.append(send(tmp_path, weights, "same-weights", change=rescaled(weights, 1.8)))
    shares = {
        space: {
            update.client: update.share
            for update in aggregate(paths, weights, method=method("multi-krum:share=0.1", space=space)).accepted
        }
        for space in ("factors", "composed")
    }
    assert shares["factors"]["same-weights"] == 0
    assert shares["composed"]["same-weights"] > 0


def test_a_short_way_in_the_factors_can_be_a_long_one_in_the_weights(tmp_path: Path) -> None:
    layout = layout_of(layer("fc", (12, 10), kind="lowrank", rank=3))
    path = tmp_path / "base.safetensors"
    base = random_tensors(layout, 1)
    base["fc.y1"] *= np.float32(100)  # the partner of x1, which makes of its short ways long ones
    write_weights(path, Weights(small_round.FINGERPRINT, 0, layout, base))
    weights = read_weights(path)

    def change(seed: int, x: float, y: float) -> dict[str, NDArray[np.float32]]:
        own = random_tensors(layout, seed)
        return {name: own[name] * np.float32({"x1": x, "y1": y}.get(name.rpartition(".")[2], 0)) for name in own}

    paths = [send(tmp_path, weights, f"c{k}", change=change(k, 0.001, 0.1)) for k in range(6)]
    paths.append(send(tmp_path, weights, "mallory", change=change(9, 0.02, 0)))
    far = {}
    for space in ("factors", "composed"):
        result = aggregate(paths, weights, method=method("multi-krum:share=0.1", space=space))
        far[space] = result.accepted[-1].share == 0
    assert far == {"factors": False, "composed": True}


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("text", ["krum", "multi-krum", "geometric-median", "centered-clipping"])
def test_composed_distances_are_those_of_composed_weights(text: str, tmp_path: Path) -> None:
    weights = start_round(tmp_path)
    paths, _ = spread_updates(tmp_path, weights, 6)
    updates = [open_update(path, weights) for path in paths]
    for update in updates:
        update.close()
    result = geometry.gram_of_weights(updates, weights)
    moves = []
    for k in range(6):
        change = random_tensors(weights.layout, k, 0.05 * (1 + k % 3) * (20 if k in (4, 7) else 1))
        after = {name: weights.tensors[name] + change[name] for name in change}
        layers = [seen for each in weights.layout.layers if (seen := travelling(weights.layout, each))]
        moves.append(
            np.concatenate(
                [
                    (
                        compose_named(weights.layout, each, after)
                        - compose_named(weights.layout, each, weights.tensors)
                    ).reshape(-1)
                    for each in layers
                ]
            )
        )
    np.testing.assert_allclose(result, np.array(moves) @ np.array(moves).T, rtol=1e-4, atol=1e-4)
    assert aggregate(paths, weights, method=method(text, space="composed")).rejected == ()


def test_the_bad_are_never_half() -> None:
    for count, share in permutations(range(1, 12), 2):
        f = count_bad(share / 25, count)
        assert 2 * f < count
        assert f >= min(share / 25 * count, (count - 1) // 2) - 1e-6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown rule": ({"rule": "medain"}, "rule: expected one of mean, median"),
    "unknown option": ({"rule": "krum:f=2"}, "rule: krum: f: expected an option of it"),
    "half": ({"rule": "trimmed:share=0.5"}, "rule: trimmed: share: expected a number"),
    "unknown mixing": ({"mixing": "nn"}, "mixing: expected one of nnm, bucketing"),
    "space of the median": ({"rule": "median", "space": "composed"}, "space: expected factors with rule median"),
    "space of the mean": ({"space": "composed"}, "space: expected factors with rule mean"),
    "refit of the median": ({"rule": "median", "merge": "refit"}, "merge: expected mean with rule median"),
    "examples": (
        {"rule": "krum", "weighting": "examples"},
        "weighting: expected equal with rule krum, which counts no",
    ),
    "examples mixed": ({"mixing": "nnm", "weighting": "examples"}, "expected equal with rule mean after mixing nnm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        AggregateConfig(**options)
    assert message in str(caught.value)


def test_the_command_takes_a_rule(tmp_path: Path, weights: Weights, run: Any) -> None:
    paths, _ = spread_updates(tmp_path, weights, 5)
    words = ("--weights", tmp_path / "base.safetensors", "-o", tmp_path / "next", "--json")
    ended = run("aggregate", *paths, *words, "--rule", "krum:share=0.3", "--mixing", "nnm", "--space", "composed")
    assert ended.code == 0, ended.err
    assert ended.json["rule"] == {"name": "krum", "share": 0.3}
    assert (ended.json["mixing"]["name"], ended.json["space"], ended.json["weighting"]) == ("nnm", "composed", "equal")
    assert sum(update["share"] for update in ended.json["accepted"]) == pytest.approx(1)
