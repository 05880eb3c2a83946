"""Kind `update`: directions from a seed, folding to the same bits everywhere, and the same weights for all."""

import hashlib
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
from small_net import CLASSES, SHAPE, batches, updating_net, without_verification

from device_runtime import TrainConfig, evaluate, open_data, train
from device_runtime.engines.registry import open_engine
from export import export_bundle
from export.folding.fold import fold
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import DivergedError, FedparaError, InputError, WrongBundleError
from fedpara_edge.factors.choice import choose_layer
from fedpara_edge.factors.compose import compose, factor_shapes, held_shapes
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import LayerSpec, Layout
from fedpara_edge.factors.rank import UpdateOptions, layer_spec
from fedpara_edge.factors.roles import keep_personal
from fedpara_edge.factors.update import check_updates, draw_directions, drawn_tensors, fold_update
from fedpara_edge.formats.bundle import ENGINES, WEIGHTS, Bundle
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.serverstate import RESIDUAL, read_state_for
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.nn import FactoredLayer, convert
from fedpara_edge.storage.tensorfile import TensorFile

LAYERS = (
    small_round.layer("conv", (6, 4, 3, 3), kind="update"),
    small_round.layer("fc", (8, 9), kind="update", rank=3),
    small_round.layer("head", (3, 8), kind="dense"),
)
LAYOUT = small_round.layout_of(*LAYERS)
FACTORS = {"conv.u", "conv.v", "fc.u", "fc.v"}


def layout_of(reset_every: int, base_momentum: float = 0.0) -> Layout:
    options = {"reset_every": reset_every, "base_momentum": base_momentum}
    return small_round.layout_of(*(replace(each, **options) if each.kind == "update" else each for each in LAYERS))


def start(folder: Path, layout: Layout = LAYOUT) -> Path:
    """Weights of round 0, whose factors are zero."""
    tensors = small_round.random_tensors(layout, 1)
    tensors |= {name: np.zeros_like(tensors[name]) for name in FACTORS}
    write_weights(folder / "0", Weights(small_round.FINGERPRINT, 0, layout, tensors))
    return folder / "0"


def directions(layer: LayerSpec, period: int = 0) -> dict[str, NDArray[np.float64]]:
    drawn = draw_directions(layer, small_round.FINGERPRINT, period)
    return {part: values.astype(np.float64) for part, values in drawn.items()}


def splitmix(seed: int, words: int) -> bytes:
    """Bytes of SplitMix64, word by word."""
    made, mask = b"", 2**64 - 1
    for number in range(1, words + 1):
        z = (seed + number * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        made += (z ^ (z >> 31)).to_bytes(8, "little")
    return made


def test_directions_are_those_of_the_specification() -> None:
    layer = LAYERS[0]
    seed = int.from_bytes(hashlib.sha256(b"fedpara-edge/update " + b"f" * 64 + b" 7 conv").digest()[:8], "little")
    stream = splitmix(seed, 100)
    rows, columns, entries = 6 * layer.rank, 36 * layer.rank, 6 * 36
    values = [(2 * byte - 255) / 256 for byte in stream[: rows + columns]]
    bits = [stream[rows + columns + number // 8] >> number % 8 & 1 for number in range(entries)]
    drawn = draw_directions(layer, small_round.FINGERPRINT, 7)
    assert {part: values.shape for part, values in drawn.items()} == {
        part: shape for part, shape in held_shapes(layer).items() if part != "base"
    }
    assert drawn["a"].ravel().tolist() == values[:rows]
    assert drawn["b"].ravel().tolist() == values[rows:]
    scale = float(np.float32(layer.scale))
    assert drawn["mask"].ravel().tolist() == [-scale if bit else scale for bit in bits]


def test_directions_differ_by_bundle_period_and_layer() -> None:
    same, other = LAYERS[1], replace(LAYERS[1], name="other")
    drawn = [draw_directions(*key)["a"] for key in ((same, "f", 0), (same, "g", 0), (same, "f", 1), (other, "f", 0))]
    assert all(not np.array_equal(drawn[0], each) for each in drawn[1:])
    assert abs(np.mean([np.mean(each) for each in drawn])) < 0.2


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), spread=st.integers(0, 30))
def test_a_fold_has_the_bits_of_the_exact_product(seed: int, spread: int) -> None:
    """Entries over many orders of magnitude, in rational numbers, rounded as float64 rounds and once to float32."""
    random = np.random.default_rng(seed)
    layer = layer_spec((3, 4), kind="update", form="matrix", rank=2)
    drawn, wide = draw_directions(layer, "f", seed), 10.0 ** random.integers(-spread, 3, (2, 4, 2))
    u, v = (
        random.standard_normal(shape) * wide[k, : shape[0]] for k, shape in enumerate(factor_shapes(layer).values())
    )
    u, v = u.astype(np.float32), v.astype(np.float32)
    base = random.standard_normal((3, 4)).astype(np.float32)
    largest = float(max(np.abs(u).max(), np.abs(v).max()))
    unit = Fraction(2) ** (int(np.frexp(largest)[1]) - 43)
    exact_u, exact_v = ([[round(Fraction(float(x)) / unit) * unit for x in row] for row in each] for each in (u, v))
    expected = np.empty((3, 4), np.float32)
    for i, j in np.ndindex(3, 4):
        total = sum(
            exact_u[i][r] * Fraction(float(drawn["b"][j, r])) + Fraction(float(drawn["a"][i, r])) * exact_v[j][r]
            for r in range(2)
        )
        expected[i, j] = np.float32(np.float64(base[i, j]) + np.float64(drawn["mask"][i, j]) * np.float64(float(total)))
    assert fold_update(base, u, v, drawn).tobytes() == expected.tobytes()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_mean_of_factors_is_the_mean_of_weights(seed: int) -> None:
    random, layer = np.random.default_rng(seed), LAYERS[0]
    held = {**directions(layer), "base": random.standard_normal(layer.shape)}
    shares = random.dirichlet(np.ones(5))
    factors = [{part: random.standard_normal(shape) for part, shape in factor_shapes(layer).items()} for _ in shares]
    mean = {part: sum(s * each[part] for s, each in zip(shares, factors, strict=True)) for part in factors[0]}
    composed = [compose(layer, {**held, **each}, np.tanh) for each in factors]
    expected = sum(s * each for s, each in zip(shares, composed, strict=True))
    np.testing.assert_allclose(compose(layer, {**held, **mean}, np.tanh), expected, rtol=0, atol=1e-13)


def test_an_update_has_a_higher_rank_than_its_factors() -> None:
    layer = layer_spec((64, 32, 3, 3), kind="update", form="matrix", rank=12)
    random, held = np.random.default_rng(0), {**directions(layer), "base": np.zeros(layer.shape)}
    factors = {part: random.standard_normal(shape) for part, shape in factor_shapes(layer).items()}
    assert np.linalg.matrix_rank(compose(layer, {**held, **factors}, np.tanh).reshape(64, -1)) == 64


@pytest.mark.parametrize("rank", [2, 48])
def test_the_even_scale_moves_a_weight_as_a_dense_one(rank: int) -> None:
    """A step of gradient descent on the factors moves each entry by its gradient, on average."""
    layer = layer_spec((96, 128), kind="update", form="matrix", rank=rank)
    drawn, gradient = directions(layer), np.random.default_rng(0).standard_normal(layer.shape)
    masked = drawn["mask"] * gradient
    u, v = -masked @ drawn["b"], -masked.T @ drawn["a"]
    moved = drawn["mask"] * (u @ drawn["b"].T + drawn["a"] @ v.T)
    assert -np.sum(moved * gradient) / np.sum(gradient**2) == pytest.approx(1, abs=0.05)


def rounds(folder: Path, layout: Layout, codec: str | None, count: int = 4) -> list[Weights]:
    """Weights of some rounds of three devices, as the server writes them; its changes are `change-N`."""
    start(folder, layout)
    for number in range(count):
        base = read_weights(folder / str(number))
        sent = [small_round.send(folder, base, client, name=f"{client}{number}") for client in "abc"]
        change = None if codec is None else folder / f"change-{number + 1}"
        config = AggregateConfig(downlink_codec=codec)
        state = None if codec is None else folder / "state"
        run_round(sent, folder / str(number), folder / str(number + 1), config, state=state, change=change)
    return [read_weights(folder / str(number)) for number in range(count + 1)]


@pytest.mark.parametrize("codec", ["float32", "int8", "topk:share=0.5"])
@pytest.mark.parametrize("reset_every", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_who_follows_the_changes_has_the_weights_of_the_snapshot(
    tmp_path: Path, codec: str, reset_every: int, momentum: float
) -> None:
    layout = layout_of(reset_every, momentum)
    written = rounds(tmp_path, layout, codec)
    device = written[0]
    for number, snapshot in enumerate(written[1:], start=1):
        device = apply_change(device, tmp_path / f"change-{number}")
        write_weights(tmp_path / f"device-{number}", device)
        assert (tmp_path / f"device-{number}").read_bytes() == (tmp_path / str(number)).read_bytes()
        assert {name: values.tobytes() for name, values in device.whole.items()} == {
            name: values.tobytes() for name, values in snapshot.whole.items()
        }
        is_moved = not np.array_equal(snapshot.tensors["conv.base"], written[number - 1].tensors["conv.base"])
        assert is_moved == (number % reset_every == 0)
        assert snapshot.tensors["fc.u"].any() == (number % reset_every != 0)


def test_a_round_moves_weights_by_the_mean_of_what_devices_composed(tmp_path: Path) -> None:
    """Whole weights, without a change: the base moves by the mean of the composed updates, to rounding."""
    before, after = rounds(tmp_path, LAYOUT, None, count=1)
    for layer in LAYERS[:2]:
        held = {**directions(layer), "base": before.tensors[f"{layer.name}.base"].astype(np.float64)}
        trained = []
        for client in "abc":
            with TensorFile(tmp_path / f"{client}0.update", format=None, error=FedparaError) as file:
                trained.append({part: file.read(f"{layer.name}.{part}").astype(np.float64) for part in "uv"})
        expected = np.mean([compose(layer, {**held, **each}, np.tanh) for each in trained], axis=0)
        np.testing.assert_allclose(after.tensors[f"{layer.name}.base"], expected, rtol=0, atol=1e-6)


def test_files_have_no_more_than_they_must(tmp_path: Path) -> None:
    written = rounds(tmp_path, layout_of(2), "float32", count=2)
    entries = {}
    for name in ("0", "1", "2", "change-1", "a0.update"):
        with TensorFile(tmp_path / name, format=None, error=FedparaError) as file:
            entries[name] = set(file.entries)
    dense = {"head.weight", "head.bias", "conv.bias", "fc.bias"}
    bases = {"conv.base", "fc.base"}
    assert entries["0"] == entries["2"] == dense | bases
    assert entries["1"] == dense | bases | FACTORS
    assert entries["change-1"] == entries["a0.update"] == dense | FACTORS
    assert set(written[0].tensors) == dense | bases | FACTORS


@pytest.mark.parametrize("algorithm", ["fedadam", "scaffold", "feddyn"])
def test_algorithms_that_keep_something_are_refused(tmp_path: Path, algorithm: str) -> None:
    path = start(tmp_path)
    sent = small_round.send(tmp_path, read_weights(path), "a")
    clients = 3 if algorithm in ("scaffold", "feddyn") else None
    config = AggregateConfig(algorithm=algorithm, clients=clients)
    with pytest.raises(InputError, match=f"kind update, .*, such as fedavg, fedavgm or fedprox, found {algorithm}"):
        run_round([sent], path, tmp_path / "1", config, state=tmp_path / "state")


@pytest.mark.parametrize("reset_every", [1, 3])
def test_momentum_of_the_server_is_kept_for_factors_within_a_period(tmp_path: Path, reset_every: int) -> None:
    layout, state = layout_of(reset_every), tmp_path / "state"
    path, config = start(tmp_path, layout), AggregateConfig(algorithm="fedavgm:momentum=0.5", unbounded=("norm",))
    sums = {name: np.float64(0) for name in (*FACTORS, "head.weight")}
    for number in range(1, 5):
        base = read_weights(path)
        change = small_round.random_tensors(layout, number, 0.01)
        sent = small_round.send(tmp_path, base, "a", change=change, name=f"a{number}")
        path = tmp_path / str(number)
        run_round([sent], tmp_path / str(number - 1), path, config, state=state)
        kept = read_state_for(state, read_weights(path))
        assert kept is not None
        for name, before in sums.items():
            sums[name] = 0.5 * before + change[name].astype(np.float64)
            if name in FACTORS and number % reset_every == 0:
                sums[name] = np.float64(0)
            np.testing.assert_allclose(
                kept.groups["momentum"][name], np.broadcast_to(sums[name], change[name].shape), atol=1e-6
            )


def test_an_update_that_explodes_is_refused(tmp_path: Path) -> None:
    path = start(tmp_path)
    base = read_weights(path)
    change = small_round.random_tensors(LAYOUT, 3, 0.1)
    huge = {**change, "fc.u": np.full_like(change["fc.u"], 1e8)}
    good = [small_round.send(tmp_path, base, client, change=change) for client in "abcdefg"]
    bad = small_round.send(tmp_path, base, "h", change=huge)
    done = run_round([*good, bad], path, tmp_path / "1", AggregateConfig(unbounded=("norm",)))
    assert [(update.client, update.code) for update in done.aggregation.rejected] == [("h", "exploded")]
    with pytest.raises((DivergedError, FedparaError), match="update of at most 1e\\+06"):
        run_round([bad], path, tmp_path / "2", AggregateConfig(strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"form": "tensor"}, "no tensor form"),
        ({"scale": 0.0}, "positive for an update"),
        ({"scale": float("inf")}, "positive for an update"),
        ({"reset_every": 0}, "positive for an update"),
        ({"rank": 7}, "rank of at most 6"),
        ({"kind": "lowrank"}, "0 for the others"),
    ],
    ids=str,
)
def test_impossible_updates_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"layer 'conv': .*{message}"):
        replace(LAYERS[0], **changed)


def test_tensors_that_are_not_those_of_the_update_are_refused(tmp_path: Path) -> None:
    check_updates(LAYOUT)
    for tensors in (
        tuple(tensor for tensor in LAYOUT.tensors if tensor.name != "fc.u"),
        tuple(replace(tensor, shape=(8, 4)) if tensor.name == "fc.u" else tensor for tensor in LAYOUT.tensors),
        tuple(replace(tensor, role="personal") if tensor.name == "fc.u" else tensor for tensor in LAYOUT.tensors),
    ):
        with pytest.raises(InputError, match="layer 'fc': expected the tensors of an update"):
            check_updates(Layout(LAYERS, tensors))
    path = start(tmp_path)
    content = path.read_bytes().replace(b'\\"part\\":\\"u\\"', b'\\"part\\":\\"a\\"')
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(WrongBundleError, match="expected the tensors of an update"):
        read_weights(path)


def test_one_factor_alone_is_not_kept_personal() -> None:
    kept = keep_personal(LAYOUT, ["fc"])
    assert {tensor.name for tensor in kept.with_role("personal")} == {"fc.u", "fc.v", "fc.bias"}
    with pytest.raises(InputError, match="both factors of the update 'fc' or none"):
        keep_personal(LAYOUT, ["fc.u"])


def test_personal_factors_keep_their_directions_and_are_not_folded() -> None:
    kept = keep_personal(LAYOUT, ["fc"])
    tensors = small_round.random_tensors(kept, 1)
    weights = Weights(small_round.FINGERPRINT, 0, kept, tensors)
    moved = weights.moved({name: tensor + 1 for name, tensor in tensors.items() if name != "fc.base"}, 1)
    drawn = [drawn_tensors(kept, small_round.FINGERPRINT, number) for number in (0, 1)]
    assert np.array_equal(drawn[0]["fc.a"], drawn[1]["fc.a"])
    assert not np.array_equal(drawn[0]["conv.a"], drawn[1]["conv.a"])
    assert np.array_equal(moved.tensors["fc.base"], weights.tensors["fc.base"])
    assert not moved.tensors["conv.u"].any()


def test_ranks_are_of_equal_size_or_given() -> None:
    fedpara = choose_layer("c", (128, 64, 3, 3), gamma=0.1).spec
    update = choose_layer("c", (128, 64, 3, 3), kind="update", gamma=0.1).spec
    assert (update.form, update.rank, update.reset_every) == ("matrix", 11, 1)
    assert update.rank * (128 + 576) <= sum(int(np.prod(s)) for s in factor_shapes(fedpara).values())
    given = choose_layer(
        "c", (128, 64, 3, 3), kind="update", rank=5, update=UpdateOptions(scale=0.5, reset_every=4)
    ).spec
    assert (given.rank, given.scale, given.reset_every) == (5, 0.5, 4)
    spec, reason, _ = choose_layer("c", (4, 9), kind="update", rank=5)
    assert (spec.kind, reason) == ("dense", "rank 5 is more than the 4 of the weight")


@pytest.mark.parametrize("option", ["scale", "reset_every"])
def test_options_of_updates_are_of_no_other_kind(option: str) -> None:
    Factorization(kind="update", **{option: 2})
    with pytest.raises(InputError, match="expected with kind update, found with fedpara") as error:
        Factorization(**{option: 2})
    assert error.value.key == option


def test_pretrained_weights_are_kept_as_they_are() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 32))
    converted, report = convert(model, Factorization(kind="update", gamma=0), pretrained=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted(x), model(x))
    assert {layer.relative_error for layer in report.converted} == {0.0}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Embedding(3000, 32), None),
        (torch.nn.Conv1d(16, 32, 5), (2, 16, 9)),
        (torch.nn.ConvTranspose2d(16, 32, 3), (2, 16, 4, 4)),
        (torch.nn.LSTM(24, 32), (5, 2, 24)),
        (torch.nn.MultiheadAttention(32, 2, batch_first=True), (2, 4, 32)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_of_all_sorts_compute_what_they_did(layer: torch.nn.Module, shape: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    converted, report = convert(layer, Factorization(kind="update", gamma=0), pretrained=True)
    assert report.converted
    x = torch.randint(3000, (2, 5)) if shape is None else torch.randn(shape)
    inputs = (x, x, x) if isinstance(layer, torch.nn.MultiheadAttention) else (x,)
    expected, found = layer(*inputs), converted(*inputs)
    torch.testing.assert_close(
        found[0] if isinstance(found, tuple) else found, expected[0] if isinstance(expected, tuple) else expected
    )
    for module in converted.modules():
        if isinstance(module, FactoredLayer) and module.spec.kind == "update":
            torch.nn.init.normal_(module.u, std=0.1)
    moved = converted(*inputs)
    assert not torch.allclose(moved[0], found[0])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bundle of the small net."""
    options = ExportConfig(name="small", input_shape=SHAPE, optimizer="sgd")
    with without_verification():
        return export_bundle(updating_net(), tmp_path_factory.mktemp("update") / "bundle", options)[0]


def with_factors(bundle: Bundle, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """All tensors of round 0 with factors that are not zero."""
    random, whole = np.random.default_rng(seed), read_weights(bundle.file(WEIGHTS), bundle).whole
    moved = [f"{layer}.{part}" for layer in ("0", "5") for part in "uv"]
    return whole | {name: random.standard_normal(whole[name].shape).astype(np.float32) for name in moved}


@pytest.mark.parametrize("name", ENGINES)
def test_steps_and_evaluations_are_torchs(bundle: Bundle, name: str) -> None:
    tensors, model = with_factors(bundle), updating_net()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()})
    engine = open_engine(bundle, name, threads=1)
    engine.load(tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches(4):
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        assert engine.evaluate(x, y).loss == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert engine.step(x, y, learning_rate=0.1, seed=0) == pytest.approx(loss.item(), rel=1e-5)
    found = engine.read()
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_bundle_says_what_it_needs(bundle: Bundle) -> None:
    manifest = (bundle.path / "manifest.json").read_text()
    assert '"schema": 3' in manifest
    assert "momentum" not in manifest.replace('"momentum": 0.0', "")  # of SGD
    layout = bundle.manifest.layout
    assert {(tensor.part, tensor.role) for tensor in layout.held} == {
        ("base", "base"),
        ("mask", "drawn"),
        ("a", "drawn"),
        ("b", "drawn"),
    }
    assert bundle.file(WEIGHTS).stat().st_size < 4 * layout.dense_parameters + 4096


def test_a_fold_is_one_dense_model(bundle: Bundle, tmp_path: Path) -> None:
    weights = read_weights(bundle.file(WEIGHTS), bundle)
    moved = replace(weights, round=1, tensors={k: v for k, v in with_factors(bundle).items() if k in weights.tensors})
    folding = fold(bundle, moved, tmp_path / "m.onnx")
    assert set(folding.layers) == {"0", "5"}
    assert folding.bytes < 4 * bundle.manifest.layout.dense_parameters + 8192


def trained(bundle: Bundle, folder: Path, weights: Path, client: str, codec: str = "int4") -> Path:
    """Update of a device with data and a state folder of its own."""
    random = np.random.default_rng(ord(client))
    data = folder / f"{client}.npz"
    np.savez(data, x=random.random((16, *SHAPE), np.float32), y=random.integers(0, CLASSES, 16))
    engine = open_engine(bundle, "onnxruntime", threads=1)
    config, output = TrainConfig(batch_size=4, lr=0.05, seed=1), folder / f"{client}-{weights.name}.update"
    dataset, state = open_data(data, bundle.manifest), folder / f"state-{client}"
    train(engine, dataset, weights, config, output=output, state=state, client=client, encoder=find_encoder(codec))
    return output


def test_devices_that_follow_train_from_the_server_s_weights(bundle: Bundle, tmp_path: Path) -> None:
    """Three rounds with codecs both ways: a device has no weights but those of its bundle and the changes."""
    server = device = bundle.file(WEIGHTS)
    config = AggregateConfig(downlink_codec="int4")
    start = read_weights(server, bundle)
    for number in (1, 2, 3):
        sent = [trained(bundle, tmp_path, device, client) for client in "ab"]
        for path in sent:
            open_update(path, read_weights(server, bundle)).close()
        change, server_next = tmp_path / f"change-{number}", tmp_path / f"server-{number}"
        run_round(sent, server, server_next, config, state=tmp_path / "state", change=change)
        mine = tmp_path / f"mine-{number}"
        write_weights(mine, apply_change(read_weights(device, bundle), change))
        assert mine.read_bytes() == server_next.read_bytes()
        server, device = server_next, mine
    moved = read_weights(device, bundle).tensors["5.base"] - start.tensors["5.base"]
    assert np.linalg.matrix_rank(moved) == CLASSES
    residual = read_state_for(tmp_path / "state", read_weights(server, bundle))
    assert residual is not None
    assert residual.groups[RESIDUAL]["5.bias"].any()
    assert not residual.groups[RESIDUAL]["5.u"].any()


def test_personal_updates_stay_on_the_device(tmp_path: Path) -> None:
    options = ExportConfig(name="p", input_shape=SHAPE, personal=("5",), engines=("onnxruntime",))
    with without_verification():
        bundle = export_bundle(updating_net(), tmp_path / "bundle", options)[0]
    weights = bundle.file(WEIGHTS)
    for number in (1, 2):
        sent = trained(bundle, tmp_path, weights, "a", "float32")
        with TensorFile(sent, format=None, error=FedparaError) as file:
            assert set(file.entries) == {"0.u", "0.v", "0.bias", "1.weight", "1.bias"}
        run_round([sent], weights, tmp_path / str(number))
        weights = tmp_path / str(number)
    assert np.array_equal(read_weights(weights).tensors["5.base"], read_weights(bundle.file(WEIGHTS)).tensors["5.base"])
    engine, dataset = open_engine(bundle, "onnxruntime", threads=1), open_data(tmp_path / "a.npz", bundle.manifest)
    common = evaluate(engine, dataset, weights=weights).loss
    assert evaluate(engine, dataset, weights=weights, state=tmp_path / "state-a").loss < common
