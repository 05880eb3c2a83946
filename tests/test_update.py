"""The update file: its bytes, the round trip, and every refusal."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from safetensors.numpy import load_file, save_file

from fedpara_edge.codecs import codec as codec_module
from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.codec import chunks
from fedpara_edge.codecs.float32 import Float32
from fedpara_edge.errors import FedparaError, InputError, InvalidUpdateError, WrongBundleError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.update import UpdateHeader, open_update, write_update
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.digest import with_digest
from fedpara_edge.storage.tensorfile import TensorFile

GOLDEN = (
    rb'{"__metadata__":{"fedpara_edge":"{\"base\":\"bb\",\"client\":\"phone-7\",\"codec\":{\"name\":\"float32\",'
    rb"\"version\":1},DIGEST\"examples\":600,\"fingerprint\":\"ff\",\"format\":\"fedpara-edge/update\","
    rb'\"metrics\":{\"loss\":0.25},\"round\":3,\"steps\":40,\"sums\":\"c00000007e800000\",\"version\":1}"},'
    rb'"fc.x1":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
    rb'"fc.y1":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}'
)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return small_round.start_round(tmp_path)


def refused(path: Path, weights: Weights, code: str, kind: type[FedparaError] = InvalidUpdateError) -> str:
    with pytest.raises(kind) as caught:
        open_update(path, weights)
    assert caught.value.code == code
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 600
    return message


def decoded(path: Path, weights: Weights) -> np.ndarray:
    update = open_update(path, weights)
    change = np.empty(weights.layout.shared_parameters, np.float32)
    with update.file:
        for start, stop in chunks(len(change)):
            update.decoder.decode(start, change[start:stop])
    return change


def test_golden_bytes(tmp_path: Path) -> None:
    layout = Layout((), (small_round.tensor("fc.y1", (1, 1)), small_round.tensor("fc.x1", (2, 1))))
    header = UpdateHeader(
        fingerprint="ff", round=3, base="bb", client="phone-7", examples=600, steps=40, metrics={"loss": 0.25}
    )
    change = {"fc.x1": np.array([[1], [-2]], np.float32), "fc.y1": np.array([[0.5]], np.float32)}
    write_update(tmp_path / "update", header, layout, change, encoder=Float32())
    # The sum of the words c0000000 3f800000 and 00000000 3f000000, and the digest of the header without it.
    data = bytes.fromhex("0000803f 000000c0 0000003f")
    stated = GOLDEN.replace(b"DIGEST", b"").replace(b"\\", b"")[len(b'{"__metadata__":{"fedpara_edge":"') :]
    digest = hashlib.sha256(stated[: stated.index(b'"},"fc.x1"')] + b"\n").hexdigest()
    text = GOLDEN.replace(b"DIGEST", rb"\"digest\":\"" + digest.encode() + rb"\",")
    table = text + b" " * (-len(text) % 8)
    assert (tmp_path / "update").read_bytes() == len(table).to_bytes(8, "little") + table + data


@pytest.mark.parametrize(
    "codec", ["float32", "float16", "int8", "int2:block=64", "uniform", "topk:share=0.2", "rotated"]
)
def test_a_value_that_was_flipped_is_noticed(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "CHUNK_ENTRIES", 64)
    norm = (
        small_round.tensor("norm.mean", (5,), part="mean"),
        small_round.tensor("norm.variance", (5,), part="variance"),
    )
    weights = small_round.start_round(tmp_path, Layout((), (small_round.tensor("w", (199,)), *norm)))
    path = small_round.send(tmp_path, weights, "a", codec=codec)
    decoded(path, weights)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    random = np.random.default_rng(0)
    flips = [(position, 1 << int(random.integers(8))) for position in range(start, len(whole))]
    flips += [(position, 1) for position in range(8, start, 7)]
    for position, bit in flips:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        with pytest.raises(FedparaError) as caught:
            decoded(path, weights)
        if position >= start and codec == "float32":
            assert caught.value.code == "digest"


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_updates_of_earlier_releases_have_no_sums(codec: str, tmp_path: Path, weights: Weights) -> None:
    path = small_round.send(tmp_path, weights, "a", codec=codec)
    expected, arrays = decoded(path, weights), load_file(path)
    with TensorFile(path, format=None, error=InvalidUpdateError) as file:
        stated = {name: value for name, value in file.header.items() if name not in ("sums", "digest")}
        sums = file.header["sums"]
    save_file(arrays, path, metadata={"fedpara_edge": json.dumps(stated)})
    np.testing.assert_array_equal(decoded(path, weights), expected)
    for half in ({"sums": sums}, {"digest": "0" * 64}):
        save_file(arrays, path, metadata={"fedpara_edge": json.dumps({**stated, **half})})
        assert "expected sums and digest in its header, found one of them" in refused(path, weights, "header")
    for bad in ("", 3, sums[:-1], sums[:-1] + "g", " " + sums[1:], sums * 2):
        save_file(arrays, path, metadata={"fedpara_edge": json.dumps(with_digest({**stated, "sums": bad}, ""))})
        assert "sums: expected 1 sums of 16 hexadecimal digits" in refused(path, weights, "header")


def test_what_is_written_is_read(tmp_path: Path, weights: Weights) -> None:
    change = small_round.random_tensors(weights.layout, 9)
    path = small_round.send(tmp_path, weights, "phone 7é", change=change, examples=1 << 40)
    update = open_update(path, weights)
    assert update.header == small_round.header(weights, "phone 7é", examples=1 << 40)
    assert update.path == path
    update.close()
    np.testing.assert_array_equal(decoded(path, weights), small_round.flat(change).astype(np.float32))


def test_only_shared_tensors_are_ever_written(tmp_path: Path, weights: Weights) -> None:
    change = {t.name: np.ones(t.shape, np.float32) for t in weights.layout.tensors}
    path = small_round.send(tmp_path, weights, "a", change={**change, "features": np.ones(3, np.float32)})
    assert set(load_file(path)) == {t.name for t in weights.layout.tensors if t.role == "shared"}
    assert not {"own.x2", "own.y2", "steps", "features"} & set(load_file(path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_diverged_change_is_not_written(tmp_path: Path, weights: Weights, value: float) -> None:
    change = small_round.random_tensors(weights.layout, 1)
    change["fc.y1"][2, 1] = value
    with pytest.raises(InvalidUpdateError, match=r"'fc.y1'.*lower the learning rate"):
        small_round.send(tmp_path, weights, "a", change=change)
    assert not (tmp_path / "a.update").exists()


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(InputError, match=r"codec: expected one of float32, .*, found 'zip'"):
        find_encoder("zip")


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"examples": 0}, "examples"),
    ({"examples": -1}, "examples"),
    ({"examples": 1.5}, "examples"),
    ({"examples": True}, "examples"),
    ({"examples": "10"}, "examples"),
    ({"examples": (1 << 40) + 1}, "examples"),
    ({"examples": 10**4000}, "examples"),
    ({"examples": None}, "examples"),
    ({"steps": 0}, "header"),
    ({"steps": []}, "header"),
    ({"round": "3"}, "header"),
    ({"client": ""}, "header"),
    ({"client": "x" * 201}, "header"),
    ({"client": "a\nb"}, "header"),
    ({"client": "\ud800"}, "header"),
    ({"client": "\u202etxt.a"}, "header"),
    ({"client": 7}, "header"),
    ({"fingerprint": None}, "header"),
    ({"base": ["x"]}, "header"),
    ({"metrics": []}, "header"),
    ({"metrics": {"loss": "low"}}, "header"),
    ({"metrics": {"loss": True}}, "header"),
    ({"metrics": {"loss": 10**400}}, "header"),
    ({"metrics": {"x" * 10_000: None}}, "header"),
    ({"metrics": {str(number): 1 for number in range(65)}}, "header"),
    ({"codec": {"name": "zip", "version": 1}}, "unknown_codec"),
    ({"codec": {"name": "float32", "version": 2}}, "unknown_codec"),
    ({"codec": {"name": "zip", "version": None}}, "unknown_codec"),
    ({"codec": {"name": "float32", "version": True}}, "unknown_codec"),
    ({"codec": {"name": "float32", "version": 1, "bits": 8}}, "unknown_codec"),
    ({"codec": "float32"}, "unknown_codec"),
    ({"codec": None}, "unknown_codec"),
    ({"codec": {"name": ["float32"], "version": 1}}, "unknown_codec"),
    ({"format": "fedpara-edge/weights"}, "wrong_format"),
    ({"version": 2}, "wrong_format"),
]


@pytest.mark.parametrize(("changed", "code"), FIELDS, ids=lambda value: str(value)[:40])
def test_every_impossible_header_field_is_refused(
    tmp_path: Path, weights: Weights, changed: dict[str, Any], code: str
) -> None:
    refused(small_round.forge(tmp_path / "update", weights, **changed), weights, code)


def test_infinite_metrics_are_no_json_of_ours(tmp_path: Path, weights: Weights) -> None:
    refused(small_round.forge(tmp_path / "update", weights, metrics={"loss": float("nan")}), weights, "wrong_format")
    with pytest.raises(InvalidUpdateError, match="metric 'loss': expected a finite number, found inf"):
        small_round.header(weights, metrics={"loss": float("inf")})


def test_a_numpy_number_is_a_metric(weights: Weights) -> None:
    assert small_round.header(weights, metrics={"loss": np.float64(0.5)}).metrics == {"loss": 0.5}


@pytest.mark.parametrize("name", ["fingerprint", "round", "base", "client", "examples", "steps", "metrics"])
def test_every_missing_header_field_is_named(tmp_path: Path, weights: Weights, name: str) -> None:
    assert name in refused(small_round.forge(tmp_path / "update", weights, drop=name), weights, "header")


def test_a_missing_codec_is_unknown(tmp_path: Path, weights: Weights) -> None:
    refused(small_round.forge(tmp_path / "update", weights, drop="codec"), weights, "unknown_codec")


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"fingerprint": "0" * 64}, "wrong_fingerprint"),
        ({"fingerprint": "\x1b[2J\n"}, "wrong_fingerprint"),
        ({"round": 2}, "wrong_round"),
        ({"base": "0"}, "wrong_base"),
        ({"base": "\ud800" * 1_000}, "wrong_base"),
    ],
)
def test_an_update_of_something_else(tmp_path: Path, weights: Weights, changed: dict[str, Any], code: str) -> None:
    path = small_round.send(tmp_path, weights, "a", **changed)
    message = refused(path, weights, code, WrongBundleError)
    assert "train again from the current weights and bundle" in message
    assert WrongBundleError.exit_code == 6


def test_tensors_that_do_not_fit(tmp_path: Path, weights: Weights) -> None:
    path = tmp_path / "update"
    good = small_round.random_tensors(weights.layout, 1)
    without = {name: value for name, value in good.items() if name != "fc.x1"}
    refused(small_round.forge(path, weights, tensors=without), weights, "missing_tensor")
    refused(small_round.forge(path, weights, tensors={}), weights, "missing_tensor")
    extra = {**good, "own.x2": np.zeros((5, 2), np.float32)}
    assert "'own.x2': expected none" in refused(
        small_round.forge(path, weights, tensors=extra), weights, "extra_tensor"
    )
    evil = {**good, "../../x": np.zeros(1, np.float32)}
    refused(small_round.forge(path, weights, tensors=evil), weights, "extra_tensor")
    half = {**good, "fc.x1": good["fc.x1"].astype(np.float16)}
    refused(small_round.forge(path, weights, tensors=half), weights, "dtype")
    turned = {**good, "fc.x1": np.ascontiguousarray(good["fc.x1"].T)}
    message = refused(small_round.forge(path, weights, tensors=turned), weights, "shape")
    assert "expected float32 [6, 2], found float32 [2, 6]" in message
    broadcast = {**good, "fc.bias": np.zeros(1, np.float32)}
    refused(small_round.forge(path, weights, tensors=broadcast), weights, "shape")


def test_tensors_in_another_order_are_refused_and_not_mixed_up(tmp_path: Path) -> None:
    layout = Layout((), (small_round.tensor("a", (1,)), small_round.tensor("b", (1,))))
    weights = small_round.start_round(tmp_path, layout)
    path = small_round.forge(tmp_path / "update", weights)
    whole = path.read_bytes()
    swapped = whole.replace(b"[0,4]", b"[?,?]").replace(b"[4,8]", b"[0,4]").replace(b"[?,?]", b"[4,8]")
    path.write_bytes(swapped)
    assert load_file(path).keys() == {"a", "b"}
    refused(path, weights, "order")


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    layout = Layout((), (small_round.tensor("a", (2,)),))
    weights = small_round.start_round(tmp_path, layout)
    whole = small_round.send(tmp_path, weights, "a").read_bytes()
    path = tmp_path / "part"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, weights, "truncated")


def test_a_closed_update_goes_on_where_it_was(tmp_path: Path, weights: Weights) -> None:
    path = small_round.send(tmp_path, weights, "a")
    update = open_update(path, weights)
    update.close()
    update.reopen()
    update.decoder.decode(0, np.empty(weights.layout.shared_parameters, np.float32))
    update.close()
    path.unlink()
    with pytest.raises(InvalidUpdateError, match="expected a readable file"):
        update.reopen()
