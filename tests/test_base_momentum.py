"""Momentum of the weights that updates are folded into: the formula, the files, and whole simulations."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_net import SHAPE, batches, updating_net, without_verification
from tiny_plan import measured, write_plan

from device_runtime.engines.registry import open_engine
from export import export_bundle
from export.folding.fold import fold
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.aggregation.partials import make_partial
from fedpara_edge.codecs import open_codec
from fedpara_edge.codecs.codec import in_order, unflatten
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.errors import DivergedError, FedparaError, InputError, WrongBundleError
from fedpara_edge.factors.choice import choose_layer
from fedpara_edge.factors.compose import compose_update, factor_shapes
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import LayerSpec, Layout
from fedpara_edge.factors.rank import UpdateOptions, layer_spec
from fedpara_edge.factors.roles import keep_personal
from fedpara_edge.factors.update import check_updates, draw_directions, fold_with_momentum
from fedpara_edge.formats.bundle import ENGINES, WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.nn import GRU, LSTM, convert, layout_of
from fedpara_edge.simulation.folder import JobFolder, RunFolder
from fedpara_edge.simulation.runner import simulate
from fedpara_edge.storage.tensorfile import TensorFile

BETA = 0.6
MOMENTUM = UpdateOptions(base_momentum=BETA)
CONV = layer_spec((6, 4, 3, 3), name="conv", kind="update", form="matrix", rank=2, update=MOMENTUM)
FC = layer_spec((8, 9), name="fc", kind="update", form="matrix", rank=3, update=MOMENTUM)
HEAD = small_round.layer("head", (3, 8), kind="dense")
LAYOUT = small_round.layout_of(CONV, FC, HEAD)
FACTORS, BASES = {"conv.u", "conv.v", "fc.u", "fc.v"}, {"conv.base", "fc.base"}
VELOCITIES = {"conv.velocity", "fc.velocity"}


def every(rounds: int, layout: Layout = LAYOUT) -> Layout:
    """The same layers with other periods."""
    return small_round.layout_of(
        *(replace(each, reset_every=rounds) if each.kind == "update" else each for each in layout.layers)
    )


def start(folder: Path, layout: Layout = LAYOUT) -> Weights:
    """Weights of round 0, in the file `0`."""
    tensors = small_round.random_tensors(layout, 1)
    tensors |= {name: np.zeros_like(tensors[name]) for name in FACTORS}
    return write_weights(folder / "0", Weights(small_round.FINGERPRINT, 0, layout, tensors))


def moved_by(layer: LayerSpec, u: NDArray[Any], v: NDArray[Any], period: int, fingerprint: str) -> NDArray[np.float64]:
    """Composed update, in plain numpy."""
    held = {part: np.float64(each) for part, each in draw_directions(layer, fingerprint, period).items()}
    factors = {"base": np.zeros(layer.shape), "u": np.float64(u), "v": np.float64(v), **held}
    return np.asarray(compose_update(factors))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), momentum=st.floats(0.01, 0.99), spread=st.integers(0, 20))
def test_a_fold_has_the_bits_of_the_formula(seed: int, momentum: float, spread: int) -> None:
    """In rational numbers, each product and sum rounded once where the specification says so."""
    random = np.random.default_rng(seed)
    layer = layer_spec((3, 4), kind="update", form="matrix", rank=2)
    drawn = draw_directions(layer, "f", seed)
    u, v = (random.integers(-999, 999, shape).astype(np.float32) / 1024 for shape in factor_shapes(layer).values())
    base, velocity = (
        (random.standard_normal((3, 4)) * 10.0 ** random.integers(-spread, 3, (3, 4))).astype(np.float32)
        for _ in range(2)
    )
    expected = np.empty((2, 3, 4), np.float32)
    for i, j in np.ndindex(3, 4):
        product = sum(
            Fraction(float(left[i, r])) * Fraction(float(right[j, r]))
            for left, right in ((u, drawn["b"]), (drawn["a"], v))
            for r in range(2)
        )
        change = float(Fraction(float(drawn["mask"][i, j])) * product)
        kept = float(Fraction(momentum) * Fraction(float(velocity[i, j])))
        expected[1, i, j] = np.float32(float(Fraction(kept) + Fraction(change)))
        expected[0, i, j] = np.float32(float(Fraction(float(base[i, j])) + Fraction(float(expected[1, i, j]))))
    found = fold_with_momentum(base, velocity, u, v, drawn, momentum=momentum)
    assert np.stack(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("reset_every", [1, 2])
def test_rounds_move_the_weights_by_a_heavy_ball(tmp_path: Path, reset_every: int) -> None:
    """Against numpy on whole weights: the mean of what devices composed, and momentum on it."""
    layout = every(reset_every)
    weights = start(tmp_path, layout)
    whole = {layer.name: np.float64(weights.tensors[f"{layer.name}.base"]) for layer in (CONV, FC)}
    ball = {name: np.zeros_like(each) for name, each in whole.items()}
    sums = {name: np.zeros(weights.tensors[name].shape) for name in FACTORS}
    for number in range(1, 6):
        sent = []
        for client in "abc":
            change = small_round.random_tensors(layout, 10 * number + ord(client), 0.1)
            sent.append(small_round.send(tmp_path, weights, client, change=change, name=f"{client}{number}"))
            for name in FACTORS:
                sums[name] += np.float64(change[name]) / 3
        run_round(sent, tmp_path / str(number - 1), tmp_path / str(number), AggregateConfig(unbounded=("norm",)))
        weights = read_weights(tmp_path / str(number))
        if number % reset_every == 0:
            for layer in (CONV, FC):
                u, v, period = sums[f"{layer.name}.u"], sums[f"{layer.name}.v"], number // reset_every - 1
                ball[layer.name] *= BETA
                ball[layer.name] += moved_by(layer, u, v, period, small_round.FINGERPRINT)
                whole[layer.name] += ball[layer.name]
            sums = {name: np.zeros_like(each) for name, each in sums.items()}
        for name, expected in whole.items():
            np.testing.assert_allclose(weights.tensors[f"{name}.base"], expected, rtol=0, atol=2e-6)
            np.testing.assert_allclose(weights.tensors[f"{name}.velocity"], ball[name], rtol=0, atol=2e-6)
        for name, expected in sums.items():
            np.testing.assert_allclose(weights.tensors[name], expected, rtol=0, atol=2e-6)


def test_a_round_of_no_change_rolls_on(tmp_path: Path) -> None:
    weights = start(tmp_path)
    random = np.random.default_rng(0)
    velocity = random.standard_normal(FC.shape).astype(np.float32)
    weights = replace(weights, tensors={**weights.tensors, "fc.velocity": velocity})
    moved = weights.moved({}, 1)
    expected = (np.float64(BETA) * velocity).astype(np.float32)
    assert np.array_equal(moved.tensors["fc.velocity"], expected)
    assert np.array_equal(moved.tensors["fc.base"], weights.tensors["fc.base"] + expected)
    assert np.array_equal(moved.tensors["conv.base"], weights.tensors["conv.base"])


def test_files_have_velocities_once_there_are_any(tmp_path: Path) -> None:
    layout, entries = every(2), {}
    weights = start(tmp_path, layout)
    for number in (1, 2, 3):
        sent = small_round.send(tmp_path, weights, "a", name=f"a{number}")
        state, change = tmp_path / "state", tmp_path / f"change-{number}"
        config = AggregateConfig(downlink_codec="float32")
        run_round([sent], tmp_path / str(number - 1), tmp_path / str(number), config, state=state, change=change)
        weights = read_weights(tmp_path / str(number))
        assert set(weights.tensors) == {tensor.name for tensor in layout.with_role("shared")} | BASES | VELOCITIES
    for name in ("0", "1", "2", "3", "change-2", "a2.update"):
        with TensorFile(tmp_path / name, format=None, error=FedparaError) as file:
            entries[name] = set(file.entries)
    dense = {"head.weight", "head.bias", "conv.bias", "fc.bias"}
    assert entries["0"] == dense | BASES
    assert entries["1"] == dense | BASES | FACTORS
    assert entries["2"] == dense | BASES | VELOCITIES
    assert entries["3"] == dense | BASES | VELOCITIES | FACTORS
    assert entries["change-2"] == entries["a2.update"] == dense | FACTORS


def test_the_digest_of_weights_covers_their_velocities(tmp_path: Path) -> None:
    weights = start(tmp_path)
    velocity = weights.tensors["fc.velocity"] + np.float32(1e-30)
    other = replace(weights, tensors={**weights.tensors, "fc.velocity": velocity})
    assert other.base != weights.base
    write_weights(tmp_path / "good", replace(weights, round=1))
    content = (tmp_path / "good").read_bytes()
    (tmp_path / "bad").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the last tensor is one
    with pytest.raises(WrongBundleError, match=r"digest"):
        read_weights(tmp_path / "bad")


def test_partials_move_the_weights_as_their_updates_do(tmp_path: Path) -> None:
    weights, exact = start(tmp_path), AggregateConfig(exact=True)
    for number in (1, 2):
        base = tmp_path / str(number - 1)
        sent = [small_round.send(tmp_path, weights, client, name=f"{client}{number}") for client in "abcd"]
        part = make_partial(sent[:2], base, tmp_path / f"part-{number}", exact).output
        run_round(sent, base, tmp_path / f"single-{number}", exact)
        run_round([part, *sent[2:]], base, tmp_path / str(number), exact)
        assert (tmp_path / str(number)).read_bytes() == (tmp_path / f"single-{number}").read_bytes()
        weights = read_weights(tmp_path / str(number))
    assert weights.tensors["fc.velocity"].any()


def test_weights_that_roll_beyond_all_numbers_are_refused(tmp_path: Path) -> None:
    weights = start(tmp_path)
    huge = np.full(FC.shape, 3e38, np.float32)
    weights = replace(weights, tensors={**weights.tensors, "fc.velocity": huge, "fc.base": huge})
    write_weights(tmp_path / "1", replace(weights, round=1))
    sent = small_round.send(tmp_path, read_weights(tmp_path / "1"), "a")
    with pytest.raises(DivergedError, match="fc"):
        run_round([sent], tmp_path / "1", tmp_path / "2")
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(InputError, match="layer 'fc': the momentum of a base is from 0 to below 1 for an update"):
        replace(FC, base_momentum=momentum)
    with pytest.raises(InputError, match="expected a number of at least 0 and below 1") as error:
        Factorization(kind="update", base_momentum=momentum)
    assert error.value.key == "base_momentum"


def test_a_momentum_is_of_no_other_kind() -> None:
    with pytest.raises(InputError, match=r"layer 'head': the momentum of a base .* 0 for the others"):
        replace(HEAD, base_momentum=0.5)
    with pytest.raises(InputError, match="expected with kind update, found with fedpara") as error:
        Factorization(base_momentum=0.5)
    assert error.value.key == "base_momentum"
    assert choose_layer("c", (64, 64, 3, 3), update=UpdateOptions(base_momentum=0.5)).spec.base_momentum == 0


def test_personal_updates_have_none() -> None:
    with pytest.raises(InputError, match=r"personal: expected no momentum for the update 'fc', .* found base_momentum"):
        keep_personal(LAYOUT, ["fc"])
    kept = keep_personal(LAYOUT, ["head"])
    assert {tensor.name for tensor in kept.with_role("velocity")} == VELOCITIES


def test_velocities_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    check_updates(LAYOUT)
    still = tuple(replace(layer, base_momentum=0.0) if layer.kind == "update" else layer for layer in LAYOUT.layers)
    for layers, tensors in (
        (LAYOUT.layers, tuple(tensor for tensor in LAYOUT.tensors if tensor.name != "fc.velocity")),
        (LAYOUT.layers, tuple(replace(t, shape=(9, 8)) if t.name == "fc.velocity" else t for t in LAYOUT.tensors)),
        (LAYOUT.layers, tuple(replace(t, role="shared") if t.name == "fc.velocity" else t for t in LAYOUT.tensors)),
        (LAYOUT.layers, tuple(replace(t, role="personal") if t.name in FACTORS else t for t in LAYOUT.tensors)),
        (still, LAYOUT.tensors),
    ):
        with pytest.raises(InputError, match="expected the tensors of an update"):
            check_updates(Layout(layers, tensors))
    start(tmp_path)
    content = (tmp_path / "0").read_bytes().replace(b'\\"base_momentum\\":0.6', b'\\"base_momentum\\":6e5')
    assert content != (tmp_path / "0").read_bytes()
    (tmp_path / "0").write_bytes(content)
    with pytest.raises(WrongBundleError, match="the momentum of a base"):
        read_weights(tmp_path / "0")


def test_a_layout_is_read_as_it_was_written() -> None:
    assert Layout.from_json(LAYOUT.to_json()) == LAYOUT
    data = LAYOUT.to_json()
    assert [layer.get("base_momentum") for layer in data["layers"]] == [BETA, BETA, None]
    data["layers"][0]["base_momentum"] = True
    with pytest.raises(InputError, match="base_momentum True"):
        Layout.from_json(data)


def exported(folder: Path, momentum: float, **options: Any) -> Bundle:
    config = ExportConfig(name="small", input_shape=SHAPE, **options)
    with without_verification():
        return export_bundle(updating_net(base_momentum=momentum), folder, config)[0]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """The small net with and without momentum."""
    folder = tmp_path_factory.mktemp("momentum")
    return exported(folder / "with", BETA), exported(folder / "without", 0.0)


@pytest.mark.slow
def test_a_bundle_has_momentum_in_its_layout_alone(bundles: tuple[Bundle, Bundle]) -> None:
    moving, still = (bundle.manifest for bundle in bundles)
    assert '"schema": 4' in (bundles[0].path / "manifest.json").read_text()
    assert (moving.graph, moving.layout.held) == (still.graph, still.layout.held)
    assert moving.layout.shared_parameters == still.layout.shared_parameters
    assert moving.layout.dense_parameters == still.layout.dense_parameters
    assert moving.fingerprint != still.fingerprint
    assert [tensor.name for tensor in moving.layout.tensors if tensor.role == "velocity"] == [
        "0.velocity",
        "5.velocity",
    ]
    sizes = [bundle.file(WEIGHTS).stat().st_size for bundle in bundles]
    assert sizes[0] < sizes[1] + 1024


@pytest.mark.parametrize("name", ENGINES)
def test_devices_train_as_without(bundles: tuple[Bundle, Bundle], name: str) -> None:
    """But for the directions, which are of the fingerprint."""
    found = []
    for bundle in bundles:
        engine = open_engine(bundle, name, threads=1)
        engine.load(read_weights(bundles[0].file(WEIGHTS), bundles[0]).whole)
        losses = [engine.step(x, y, learning_rate=0.1, seed=0) for x, y in batches(3)]
        found.append((losses, {name: values.tobytes() for name, values in engine.read().items()}))
    assert found[0] == found[1]


def test_a_fold_is_of_the_weights_alone(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    bundle = bundles[0]
    weights = read_weights(bundle.file(WEIGHTS), bundle)
    velocity = np.ones_like(weights.tensors["5.velocity"])
    moved = replace(weights, round=1, tensors={**weights.tensors, "5.velocity": velocity})
    write_weights(tmp_path / "1", moved)
    folding = fold(bundle, read_weights(tmp_path / "1", bundle), tmp_path / "m.onnx")
    assert set(folding.layers) == {"0", "5"}
    assert folding.bytes < 4 * bundle.manifest.layout.dense_parameters + 8192


def test_initial_weights_of_a_seed_have_no_velocities(tmp_path: Path) -> None:
    bundle = exported(tmp_path / "bundle", BETA, engines=("onnxruntime",), initial_codec="drawn")
    weights = read_weights(bundle.file(WEIGHTS), bundle)
    assert not weights.tensors["5.velocity"].any()
    assert weights.tensors["5.base"].any()
    assert weights.base == read_weights(bundle.file(WEIGHTS)).base
    assert bundle.file(WEIGHTS).stat().st_size < 8192


def test_older_readers_refuse_the_bundle(bundles: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpara_edge.formats.bundle.SCHEMAS", (1, 2, 3))
    with pytest.raises(WrongBundleError, match="found 4; use the release that exported it"):
        open_bundle(bundles[0].path)
    open_bundle(bundles[1].path)


def test_all_layers_that_are_converted_have_it() -> None:
    model = torch.nn.ModuleList(
        [
            torch.nn.Conv2d(16, 32, 3),
            torch.nn.Linear(64, 64),
            torch.nn.Embedding(3000, 32),
            torch.nn.LSTM(24, 32),
            torch.nn.MultiheadAttention(32, 2),
            torch.nn.ConvTranspose2d(16, 32, 3),
        ]
    )
    converted, _ = convert(model, Factorization(kind="update", gamma=0, base_momentum=BETA), pretrained=True)
    layout = layout_of(converted)
    layers = [layer for layer in layout.layers if layer.kind == "update"]
    assert {layer.name.split(".")[0] for layer in layers} == set("012345")
    assert {layer.base_momentum for layer in layers} == {BETA}
    assert {tensor.layer for tensor in layout.with_role("velocity")} == {layer.name for layer in layers}
    check_updates(layout)
    assert not any("velocity" in name for name in converted.state_dict())
    for made in (LSTM(24, 32, kind="update", update=MOMENTUM), GRU(24, 32, kind="update", update=MOMENTUM)):
        assert {weight.spec.base_momentum for weight in made.weights().values()} == {BETA}


def test_a_frozen_layer_has_no_velocity() -> None:
    model = updating_net(base_momentum=BETA)
    model[0].requires_grad_(False)
    layout = layout_of(model)
    check_updates(layout)
    assert [tensor.name for tensor in layout.with_role("velocity")] == ["5.velocity"]


ARMS = f"""
[arms.moving]
model.kind = "update"
model.base_momentum = {BETA}
model.initial_codec = "drawn"
aggregate.algorithm = "fedavgm:momentum={BETA}"
aggregate.downlink_codec = "int8"
train.codec = "int8"
[arms.slowly]
model.kind = "update"
model.base_momentum = {BETA}
model.reset_every = 2
[arms.still]
model.kind = "update"
[arms.apart]
model.kind = "update"
model.base_momentum = {BETA}
local_only = true
"""


def decoded(change: Path, layout: Layout) -> dict[str, NDArray[np.float32]]:
    """Change of the shared tensors in a file, before any fold."""
    tensors = in_order(layout.shared)
    with TensorFile(change, format="fedpara-edge/change", error=FedparaError) as file:
        return unflatten(tensors, decode_all(open_codec(file, tensors), layout.shared_parameters))


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_simulation_moves_weights_by_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was published is replayed in plain numpy, from the initial weights on."""
    monkeypatch.setattr(JobFolder, "clear", lambda *_: None)
    plan = write_plan(tmp_path)
    text = plan.read_text()
    plan.write_text(text[: text.index("[arms.dense]")].replace("rounds = 2", "rounds = 3") + ARMS)
    with without_verification():
        simulate(plan, tmp_path / "run", workers=1)
    for arm, reset_every in (("moving", 1), ("slowly", 2)):
        job = RunFolder(tmp_path / "run").job(arm, 4)
        bundle = open_bundle(job.bundle)
        weights = read_weights(bundle.file(WEIGHTS), bundle)
        layers = [layer for layer in weights.layout.layers if layer.kind == "update"]
        assert layers
        whole = {layer.name: np.float64(weights.tensors[f"{layer.name}.base"]) for layer in layers}
        ball = {name: np.zeros_like(each) for name, each in whole.items()}
        for number in (1, 2, 3):
            change = job.change(number)
            before, weights = weights, apply_change(weights, change)
            if number % reset_every == 0:
                sent = decoded(change, weights.layout)
                for layer in layers:
                    names = [f"{layer.name}.{part}" for part in "uv"]
                    u, v = (before.tensors[name] + sent[name] for name in names)
                    ball[layer.name] *= BETA
                    ball[layer.name] += moved_by(layer, u, v, number // reset_every - 1, weights.fingerprint)
                    whole[layer.name] += ball[layer.name]
            for name, expected in whole.items():
                np.testing.assert_allclose(weights.tensors[f"{name}.base"], expected, rtol=0, atol=1e-6)
        published = read_weights(job.weights(3), bundle)
        assert published.base == weights.base
        assert all(each.any() for each in ball.values())
    events = measured(tmp_path / "run")
    assert {event["arm"] for event in events} == {"moving", "slowly", "still", "apart"}
