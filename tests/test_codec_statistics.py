"""Running statistics in encoded changes: stored apart by every codec, and safe from what it leaves out."""

from pathlib import Path

import encoded
import numpy as np
import pytest
import small_round
from encoded import EVERY

from fedpara_edge.aggregation import aggregate
from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.codec import Encoded, flatten, in_order
from fedpara_edge.codecs.statistics import encode_change, left_out
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.change import apply_change, publish_change
from fedpara_edge.formats.encoded import bits_by_tensor, open_encoded
from fedpara_edge.formats.weights import Weights

SIZES = {"b.weight": 300, "a.running_var": 90, "a.running_mean": 90, "c.weight": 41}
PARTS = {"running_mean": "mean", "running_var": "variance", "weight": "norm"}
LAYOUT = Layout(
    (),
    tuple(small_round.tensor(name, (size,), name[0], PARTS[name.partition(".")[2]]) for name, size in SIZES.items()),
)
SPECS = in_order(LAYOUT.shared)
TRAINED = 341
every_codec = pytest.mark.parametrize("name", EVERY)


def change(seed: int = 0) -> np.ndarray:
    """Small changes of the weights, and statistics of all magnitudes."""
    random = np.random.default_rng(seed)
    statistics = random.standard_normal(180) * 10.0 ** random.integers(-9, 4, 180)
    return np.concatenate([1e-3 * random.standard_normal(TRAINED), statistics]).astype(np.float32)


def store(path: Path, name: str, values: np.ndarray, seed: int | None = None) -> Encoded:
    encoder = find_encoder(name)
    found = encode_change(encoder, SPECS, values, seed=seed)
    encoded.write(path, found.arrays, {"name": encoder.name, "version": encoder.version, **found.settings})
    return found


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks without statistics, with some, and with nothing else."""
    monkeypatch.setattr("fedpara_edge.codecs.codec.CHUNK_ENTRIES", 128)


def test_statistics_come_last() -> None:
    assert [tensor.name for tensor in SPECS] == ["b.weight", "c.weight", "a.running_mean", "a.running_var"]


@pytest.mark.parametrize("seed", [None, 4])
@every_codec
def test_what_is_read_is_what_the_encoder_said(name: str, seed: int | None, tmp_path: Path) -> None:
    values = change()
    found = store(tmp_path / "file", name, values, seed)
    np.testing.assert_array_equal(encoded.decode(tmp_path / "file", SPECS), found.decoded)
    np.testing.assert_allclose(found.decoded[TRAINED:], values[TRAINED:], rtol=2**-10, atol=2**-24)


@every_codec
def test_the_rest_is_encoded_as_if_there_were_no_statistics(name: str) -> None:
    encoder, values = find_encoder(name), change()
    alone = encoder.encode(SPECS[:2], values[:TRAINED], seed=3)
    found = encode_change(encoder, SPECS, values, seed=3)
    np.testing.assert_array_equal(found.decoded[:TRAINED], alone.decoded)
    assert found.settings == alone.settings


@every_codec
def test_no_variance_becomes_negative(name: str) -> None:
    random = np.random.default_rng(1)
    before, after = (np.abs(10.0 ** random.uniform(-8, 4, 180)).astype(np.float32) for _ in range(2))
    values = np.concatenate([change()[:TRAINED], after - before])
    decoded = encode_change(find_encoder(name), SPECS, values, seed=None).decoded[TRAINED:]
    assert (before + decoded).min() >= 0


def test_statistics_beyond_float16_are_float32(tmp_path: Path) -> None:
    values = change()
    values[-1] = 1e6
    assert store(tmp_path / "file", "int4", values).arrays["statistics"].dtype == np.float32
    np.testing.assert_array_equal(encoded.decode(tmp_path / "file", SPECS)[TRAINED:], values[TRAINED:])


def test_float32_stores_statistics_as_any_tensor() -> None:
    assert list(encode_change(find_encoder("float32"), SPECS, change(), seed=None).arrays) == [t.name for t in SPECS]


@pytest.mark.parametrize("specs", [SPECS[:2], SPECS[:3]])
def test_statistics_that_do_not_fit_are_refused(specs: list, tmp_path: Path) -> None:
    store(tmp_path / "file", "int8", change())
    with pytest.raises(InvalidUpdateError, match=r"expected (no )?'statistics'.*, found float16 \[180\]; "):
        encoded.decode(tmp_path / "file", specs)
    encoder = find_encoder("int8")
    arrays = encoder.encode(SPECS[:2], change()[:TRAINED], seed=None).arrays
    encoded.write(tmp_path / "other", arrays, {"name": "int8", "version": encoder.version, "block": 1024})
    with pytest.raises(InvalidUpdateError, match=r"expected 'statistics' of float16 or float32 \[180\], found none"):
        encoded.decode(tmp_path / "other", SPECS)


@every_codec
def test_updates_of_any_codec_are_averaged_together(name: str, tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, LAYOUT)
    updates = [small_round.send(tmp_path, weights, client, codec=name) for client in "ab"]
    updates.append(small_round.send(tmp_path, weights, "c"))
    done, plain = aggregate(updates, weights), aggregate([updates[2]], weights)
    assert len(done.accepted) == 3
    exact = [small_round.send(tmp_path, weights, client) for client in "abc"]
    for tensor in LAYOUT.statistics:
        expected = aggregate(exact, weights).weights.tensors[tensor.name]
        np.testing.assert_allclose(done.weights.tensors[tensor.name], expected, atol=1e-3)
        assert not np.allclose(expected, plain.weights.tensors[tensor.name])


def test_what_a_codec_leaves_out_of_statistics_is_not_kept() -> None:
    values = {tensor.name: np.ones(tensor.shape, np.float32) for tensor in SPECS}
    halves = {name: value / 2 for name, value in values.items()}
    left = left_out(SPECS, values, halves)
    assert {name: float(tensor.max()) for name, tensor in left.items()} == {
        name: 0.0 if "running" in name else 0.5 for name in values
    }


@every_codec
def test_published_statistics_follow_the_servers(name: str, tmp_path: Path) -> None:
    base = small_round.start_round(tmp_path, LAYOUT)
    published, residual = base, None
    for number in range(4, 8):
        values = flatten(SPECS, small_round.random_tensors(LAYOUT, number))
        tensors = {t.name: np.abs(v) for t, v in zip(SPECS, np.split(values, [300, 341, 431]), strict=True)}
        target = Weights(base.fingerprint, number, LAYOUT, tensors)
        done = publish_change(tmp_path / "change", published, target, find_encoder(name), residual=residual)
        assert apply_change(published, tmp_path / "change").base == done.weights.base
        published, residual = done.weights, done.residual
        for tensor in LAYOUT.statistics:
            np.testing.assert_allclose(published.tensors[tensor.name], tensors[tensor.name], atol=0.01)


def test_inspect_counts_the_bits_of_statistics(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, LAYOUT)
    for codec, expected in (("int4", 16.0), ("float32", 32.0)):
        update = small_round.send(tmp_path, weights, "a", codec=codec)
        with open_encoded(update, weights) as file:
            bits = bits_by_tensor(file, SPECS)
        assert [bits[f"a.running_{part}"] for part in ("mean", "var")] == [expected, expected]
        assert (bits["b.weight"] < 16) == (codec == "int4")
