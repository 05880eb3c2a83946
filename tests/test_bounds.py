"""What one well-formed client can do to a round: bounded, named, and by an explicit option only not bounded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_round import flat, forge, layer, layout_of, random_tensors, send, start_round, tensor

from fedpara_edge.aggregation import AggregateConfig, Aggregation, Bounds, aggregate, run_round
from fedpara_edge.aggregation.bounds import NAMES, UNBOUNDED
from fedpara_edge.aggregation.norms import NormMeter
from fedpara_edge.aggregation.stream import stream_mean
from fedpara_edge.algorithms import SERVER, find_server
from fedpara_edge.algorithms.scaffold import ScaffoldServer
from fedpara_edge.codecs import ENCODERS
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.errors import DivergedError, InputError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.update import Update, open_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights

HONEST = ("a", "b", "c", "d")
CLAIM = 1 << 40
MOST = Bounds().max_norm
Change = dict[str, NDArray[np.float32]]
examples = st.lists(st.integers(1, CLAIM), min_size=1, max_size=12)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return start_round(tmp_path)


def closed(path: Path, weights: Weights) -> Update:
    update = open_update(path, weights)
    update.close()
    return update


def change_of(path: Path, weights: Weights) -> NDArray[np.float64]:
    update = open_update(path, weights)
    change = decode_all(update.decoder, weights.layout.shared_parameters)
    update.close()
    return change.astype(np.float64)


def moved(result: Aggregation, weights: Weights) -> NDArray[np.float64]:
    return flat(result.weights.tensors) - flat(weights.tensors)


def honest(folder: Path, weights: Weights, **changed: Any) -> list[Path]:
    """Updates of a common direction, each with some of its own, and uneven numbers of examples."""
    common = random_tensors(weights.layout, 99, 0.1)
    paths = []
    for number, client in enumerate(HONEST):
        own = random_tensors(weights.layout, number, 0.05)
        change = {name: common[name] + own[name] for name in own}
        paths.append(send(folder, weights, client, change=change, **{"examples": 10 + 5 * number, **changed}))
    return paths


def attack(folder: Path, weights: Weights, factor: float, claimed: int = 15, **changed: Any) -> Path:
    change = {name: np.float32(factor) * value for name, value in random_tensors(weights.layout, 99, 0.1).items()}
    return send(folder, weights, "mallory", change=change, examples=claimed, **changed)


@given(examples=examples, data=st.data())
def test_shares_sum_to_one_and_none_is_above_the_largest(examples: list[int], data: st.DataObject) -> None:
    bounds = Bounds(max_share=data.draw(st.floats(0.01, 1)), max_examples=data.draw(st.floats(1, 100)))
    shares = bounds.shares(examples, "examples")
    assert shares.sum() == pytest.approx(1)
    if len(examples) > 2:
        assert shares.max() <= max(bounds.max_share, 1.5 / len(examples)) * (1 + 1e-9)
    order = data.draw(st.permutations(range(len(examples))))
    np.testing.assert_allclose(bounds.shares([examples[k] for k in order], "examples"), shares[list(order)])
    ascending = np.argsort(examples, kind="stable")
    assert (np.diff(shares[ascending]) >= -1e-12).all()


@given(examples)
def test_examples_within_the_bounds_count_as_they_are(examples: list[int]) -> None:
    """To the last bit: a round of honest clients is as it would be without bounds."""
    expected = np.array([each / sum(examples) for each in examples])
    loose = Bounds(max_share=1, max_examples=CLAIM)
    for bounds in (UNBOUNDED, loose, *([Bounds()] if len(examples) < 3 else [])):
        np.testing.assert_array_equal(bounds.shares(examples, "examples"), expected)


norms_of_float32 = st.just(0.0) | st.floats(1e-45, 1e30)


@given(st.lists(norms_of_float32, min_size=3, max_size=9), st.floats(1, 10))
def test_no_norm_stays_above_its_bound(norms: list[float], most: float) -> None:
    row = np.array(norms)
    factors = Bounds(max_norm=most).factors(row[None])
    assert ((factors > 0) & (factors <= 1)).all()
    if (row > 0).sum() >= 3:
        assert (row * factors).max() <= most * np.median(row[row > 0]) * (1 + 1e-12)
    assert (Bounds(max_norm=most, unbounded=("norm",)).factors(row[None]) == 1).all()


@pytest.mark.parametrize("codec", ENCODERS)
def test_norms_are_those_of_the_decoded_changes(codec: str, tmp_path: Path) -> None:
    text = f"{codec}:bytes=9000" if codec == "adaptive" else codec
    statistics = [tensor(f"bn.{part}", (3,), "bn", part) for part in ("mean", "variance")]
    layout = Layout((), (tensor("a", (70_000,)), *statistics, tensor("z", (2000,))))
    weights = start_round(tmp_path, layout)
    paths = [
        send(tmp_path, weights, client, change=random_tensors(layout, 3, scale), codec=text)
        for client, scale in zip(
            "abcd", (0.1, 1e-23, 1e17, 0) if codec == "float32" else (0.1, 0.01, 10, 0), strict=True
        )
    ]
    updates = [closed(path, weights) for path in paths]
    meter = NormMeter(layout, len(updates))
    stream_mean(updates, layout.shared, shares=np.full((1, 4), 0.25), watchers=[meter])
    own = np.concatenate([np.full(t.size, t.part != "other") for t in in_order(layout.shared)])
    for column, path in enumerate(paths):
        change = change_of(path, weights)
        expected = [np.linalg.norm(change[~own]), np.linalg.norm(change[own])]
        np.testing.assert_allclose(meter.norms()[:, column], expected, rtol=1e-5)


@pytest.mark.parametrize("algorithm", sorted(SERVER))
def test_a_round_of_honest_clients_is_the_same_without_bounds(algorithm: str, tmp_path: Path) -> None:
    weights = start_round(tmp_path, number=0)
    metrics = {"learning_rate_sum": 0.4, "alpha": 0.1}
    paths = honest(tmp_path, weights, metrics=metrics)
    server = find_server(algorithm, clients=9 if algorithm in ("scaffold", "feddyn") else None)
    server = find_server("feddyn:alpha=0.1", clients=9) if algorithm == "feddyn" else server
    bounded, free = (aggregate(paths, weights, algorithm=server, bounds=each) for each in (Bounds(), UNBOUNDED))
    assert bounded.weights.base == free.weights.base
    assert all(not update.bounded and update.scale == 1 for update in bounded.accepted)


ATTACKS = {
    "reversed and large": (-10.0, 15, ("norm",)),
    "huge": (1e12, 15, ("norm",)),
    "numbers whose squares are infinite": (-1e30, 15, ("norm",)),
    "reversed with a claim": (-1.0, CLAIM, ("examples", "share")),
    "nothing with a claim": (0.0, CLAIM, ("examples", "share")),
    "all of it": (-1e12, CLAIM, ("norm", "examples", "share")),
}


@pytest.mark.parametrize("case", ATTACKS)
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_an_attacker_is_bounded_and_named(case: str, codec: str, tmp_path: Path, weights: Weights) -> None:
    factor, claimed, names = ATTACKS[case]
    paths = [*honest(tmp_path, weights), attack(tmp_path, weights, factor, claimed, codec=codec)]
    result = aggregate(paths, weights)
    assert result.rejected == ()
    *others, mallory = result.accepted
    assert mallory.bounded == names
    assert not any(update.bounded for update in others)
    changes = np.stack([change_of(path, weights) for path in paths])
    norms = np.linalg.norm(changes, axis=1)
    scales = np.minimum(1, MOST * np.median(norms[norms > 0]) / np.maximum(norms, 1e-9))
    counted = np.minimum([update.examples for update in result.accepted], 10 * 15)
    shares = counted / counted.sum()
    if "share" in names:
        shares = np.append(0.67 * shares[:-1] / shares[:-1].sum(), 0.33)
    np.testing.assert_allclose([update.share for update in result.accepted], shares)
    np.testing.assert_allclose([update.scale for update in result.accepted], scales, rtol=1e-4)
    np.testing.assert_allclose(moved(result, weights), (shares * scales) @ changes, atol=2e-6)
    if len(names) < 3:
        assert moved(result, weights) @ flat(random_tensors(weights.layout, 99, 0.1)) > 0
    assert (
        np.linalg.norm(mallory.share * mallory.scale * changes[-1]) <= 0.33 * MOST * np.median(norms[norms > 0]) * 1.001
    )


def test_bounds_bind_in_any_order_of_the_files(tmp_path: Path, weights: Weights) -> None:
    paths = [*honest(tmp_path, weights), attack(tmp_path, weights, -1e6, CLAIM)]
    bases = {aggregate(order, weights).weights.base for order in (paths, paths[::-1], paths[2:] + paths[:2])}
    assert len(bases) == 1


def test_what_is_refused_leaves_no_trace_in_the_bounds(tmp_path: Path, weights: Weights) -> None:
    paths = [*honest(tmp_path, weights), attack(tmp_path, weights, -30)]
    nothing = {name: np.full_like(value, np.nan) for name, value in weights.tensors.items()}
    bad = [forge(tmp_path / f"nan-{n}", weights, tensors=nothing, client=f"n{n}", examples=1) for n in range(9)]
    result, alone = aggregate([*paths, *bad], weights), aggregate(paths, weights)
    assert result.weights.base == alone.weights.base
    assert result.accepted == alone.accepted


@pytest.mark.parametrize("name", ["norm", "examples", "share"])
def test_each_bound_is_off_by_its_own_name(name: str, tmp_path: Path, weights: Weights) -> None:
    paths = [*honest(tmp_path, weights), attack(tmp_path, weights, -10, CLAIM)]
    (mallory,) = (update for update in aggregate(paths, weights, bounds=Bounds(unbounded=(name,))).accepted[-1:])
    assert mallory.bounded == tuple(each for each in ("norm", "examples", "share") if each != name)


def test_of_two_neither_is_in_the_majority(tmp_path: Path, weights: Weights) -> None:
    paths = [honest(tmp_path, weights)[0], attack(tmp_path, weights, -10, CLAIM)]
    assert aggregate(paths, weights).weights.base == aggregate(paths, weights, bounds=UNBOUNDED).weights.base


def test_clients_that_send_nothing_do_not_bound_the_others(tmp_path: Path, weights: Weights) -> None:
    still = {name: np.zeros_like(value) for name, value in weights.tensors.items()}
    idle = [send(tmp_path, weights, f"idle-{number}", change=still) for number in range(9)]
    result = aggregate([*honest(tmp_path, weights), *idle], weights)
    assert not any(update.bounded for update in result.accepted)


def test_running_statistics_have_a_norm_of_their_own(tmp_path: Path) -> None:
    """Large honest statistics don't hide a large change, and a large variance is scaled down as well."""
    layout = Layout((), (tensor("a", (50,)), *(tensor(f"bn.{p}", (3,), "bn", p) for p in ("mean", "variance"))))
    path = tmp_path / "base"
    base: Change = {t.name: np.ones(t.shape, np.float32) for t in layout.shared}
    write_weights(path, Weights("0", 0, layout, base))
    weights = read_weights(path)

    def changed(trained: float, statistics: float) -> Change:
        return {name: np.full_like(v, trained if name == "a" else statistics) for name, v in base.items()}

    paths = [send(tmp_path, weights, client, change=changed(0.1, 100)) for client in HONEST]
    paths += [send(tmp_path, weights, "large", change=changed(-50, 100))]
    paths += [send(tmp_path, weights, "variance", change=changed(0.1, 1e6))]
    result = aggregate(paths, weights, bounds=Bounds(max_norm=2.0))
    assert {update.client: update.bounded for update in result.accepted if update.bounded} == {
        "large": ("norm",),
        "variance": ("norm",),
    }
    assert moved(result, weights)[:50] == pytest.approx((5 * 0.1 - 0.2) / 6)
    tensors = result.weights.tensors
    assert tensors["bn.mean"] == pytest.approx(1 + (5 * 100 + 200) / 6)
    spread = np.var([100.0] * 5 + [200])  # of the means that counted
    moment = np.mean([101.0**2] * 5 + [201.0**2])  # in float32 as well, and the mean's square is taken from it
    assert tensors["bn.variance"] == pytest.approx(1 + (5 * 100 + 200) / 6 + spread, rel=1e-6, abs=4 * 2**-24 * moment)


def scaffold_round(folder: Path, sums: Sequence[float], steps: Sequence[int]) -> tuple[list[Path], Weights]:
    weights = start_round(folder, number=0)
    common = random_tensors(weights.layout, 99, 0.1)
    return [
        send(folder, weights, f"c{k}", change=common, steps=steps[k], metrics={"learning_rate_sum": each})
        for k, each in enumerate(sums)
    ], weights


@pytest.mark.parametrize("rate_sum", [1e-3, 1e-20, 1e20])
def test_a_learning_rate_far_from_the_others_is_refused_by_name(rate_sum: float, tmp_path: Path) -> None:
    paths, weights = scaffold_round(tmp_path, [0.4, 0.5, 0.3, rate_sum], [4, 5, 3, 4])
    server = ScaffoldServer(clients=9)
    result = aggregate(paths, weights, algorithm=server)
    assert [(update.client, update.code) for update in result.rejected] == [("c3", "metrics")]
    assert "expected a metric learning_rate_sum of 0.01 to 1 for each step" in result.rejected[0].reason
    alone = aggregate(paths[:3], weights, algorithm=server)
    assert result.weights.base == alone.weights.base
    assert result.state is not None
    assert alone.state is not None
    for name, control in result.state.groups["control"].items():
        np.testing.assert_array_equal(control, alone.state.groups["control"][name])


def test_a_control_variate_is_bounded_where_the_steps_are_a_lie_as_well(tmp_path: Path) -> None:
    """One step at the usual rate for a change of a hundred: c_i would be a hundred times that of the others."""
    paths, weights = scaffold_round(tmp_path, [10, 10, 10, 0.1], [100, 100, 100, 1])
    result = aggregate(paths, weights, algorithm=ScaffoldServer(clients=4))
    assert result.accepted[-1].bounded == ("norm",)
    assert result.accepted[-1].scale == pytest.approx(MOST / 100)
    assert result.state is not None
    honest = np.linalg.norm(flat(random_tensors(weights.layout, 99, 0.1))) / 10
    assert np.linalg.norm(flat(result.state.groups["control"])) <= 1.26 * honest


def test_uneven_learning_rates_are_taken(tmp_path: Path) -> None:
    paths, weights = scaffold_round(tmp_path, [0.1, 0.4, 0.9, 2], [4, 4, 4, 4])
    assert aggregate(paths, weights, algorithm=ScaffoldServer(clients=4)).rejected == ()


def exploding(folder: Path, weights: Weights, client: str) -> Path:
    values: Change = {name: np.full_like(value, 1e12) for name, value in weights.tensors.items()}
    return send(folder, weights, client, change=values)


@pytest.mark.parametrize("kind", ["fedpara", "lowrank", "pfedpara"])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3)], ids=str)
def test_factors_that_compose_to_enormous_weights_are_refused_by_name(
    kind: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    weights = start_round(tmp_path, layout_of(layer("fc", shape, kind=kind)))
    good, bad = send(tmp_path, weights, "good"), exploding(tmp_path, weights, "bad")
    for paths, bounds in (([good, bad], Bounds()), ([*honest(tmp_path, weights), bad], Bounds(unbounded=("norm",)))):
        result = aggregate(paths, weights, bounds=bounds)
        assert [(update.client, update.code) for update in result.rejected] == [("bad", "exploded")]
        assert "layer 'fc': expected composed weights of at most 1e+06, found " in result.rejected[0].reason
    free = aggregate([good, bad], weights, bounds=UNBOUNDED)
    assert free.rejected == ()


def test_a_step_that_explodes_is_nobodys_fault_and_writes_nothing(tmp_path: Path, weights: Weights) -> None:
    paths, output = honest(tmp_path, weights), tmp_path / "next"
    config = AggregateConfig(algorithm="fedavg:lr=1e12")
    with pytest.raises(DivergedError, match=r"layer 'conv': .* after the step of algorithm fedavg, found 1.*; lower"):
        run_round(paths, tmp_path / "base.safetensors", output, config)
    assert not output.exists()


def test_tanh_bounds_a_weight_by_itself(tmp_path: Path) -> None:
    weights = start_round(tmp_path, layout_of(layer("fc", (6, 5), tanh=True)))
    assert aggregate([exploding(tmp_path, weights, "a")], weights).rejected == ()


@pytest.mark.parametrize(("key", "value"), [("max_norm", 0.5), ("max_share", 0), ("max_examples", 0)])
def test_bounds_out_of_range_are_refused(key: str, value: float) -> None:
    for kind in (Bounds, AggregateConfig):
        with pytest.raises(InputError, match=f"{key}: expected a number"):
            kind(**{key: value})
    with pytest.raises(InputError, match=f"unbounded: expected some of {', '.join(NAMES)}"):
        Bounds(unbounded=("nrom",))


def test_the_command_names_the_outliers(tmp_path: Path, weights: Weights, run: Any) -> None:
    paths = [*map(str, [*honest(tmp_path, weights), attack(tmp_path, weights, -30, CLAIM)])]
    command = ("aggregate", *paths, "--weights", tmp_path / "base.safetensors", "--overwrite", "-o", tmp_path / "next")
    ended = run(*command)
    assert ended.code == 0
    assert "0 rejected, 1 bounded" in ended.out
    (line,) = [line for line in ended.err.splitlines() if line.startswith("outlier")]
    assert line.startswith(f"outlier {paths[-1]}: client 'mallory': more than 10 times the median of examples")
    assert "more than 33% of the total weight" in line
    assert "times the median norm, scaled down to 1.5 times (--max-norm)" in line
    ended = run(*command, "--json")
    assert [update["bounded"] for update in ended.json["accepted"]] == [[]] * 4 + [["norm", "examples", "share"]]
    assert ended.json["accepted"][-1]["scale"] < 0.2
    ended = run(*command, *(word for name in ("norm", "examples", "share") for word in ("--unbounded", name)))
    assert "which counts in full (--unbounded norm)" in ended.err
    assert "bounded" not in ended.out


def test_json_has_no_infinity(tmp_path: Path, weights: Weights) -> None:
    result = aggregate([attack(tmp_path, weights, 1e38)], weights, bounds=UNBOUNDED)
    json.dumps(result.to_json(), allow_nan=False)
