"""The weights file."""

import dataclasses
import hashlib
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from golden import DIGEST, content_of
from norms import norm
from safetensors.numpy import load_file, save_file

from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.storage.tensorfile import write_tensors

GOLDEN = (
    rb'{"__metadata__":{"fedpara_edge":"{'
    rb"\"digest\":\"c9d29c5043751556e03d014839b271be0dddb226efd518908ba124f27fa4cbb5\","
    rb"\"fingerprint\":\"ff\",\"format\":\"fedpara-edge/weights\","
    rb"\"layout\":{\"layers\":[],\"tensors\":[{\"dtype\":\"float32\",\"layer\":\"\",\"name\":\"a\","
    rb"\"part\":\"other\",\"role\":\"shared\",\"shape\":[2]}]},"
    rb'\"round\":3,\"version\":1}"},'
    rb'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
)


def rewrite(path: Path, *, tensors: dict[str, Any] | None = None, **changed: Any) -> None:
    """Change header fields (None removes one) or tensors of a weights file."""
    weights = read_weights(path)
    header = {
        "format": "fedpara-edge/weights",
        "version": 1,
        "fingerprint": weights.fingerprint,
        "round": weights.round,
        "layout": weights.layout.to_json(),
        **changed,
    }
    text = json.dumps({name: value for name, value in header.items() if value is not None})
    save_file(dict(weights.tensors) if tensors is None else tensors, path, metadata={"fedpara_edge": text})


def refused(path: Path, text: str) -> None:
    with pytest.raises(WrongBundleError, match=text) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 600 + len(str(path))


def test_golden_bytes_with_a_digest_and_without_as_up_to_0_2(tmp_path: Path) -> None:
    layout = Layout((), (small_round.tensor("a", (2,)),))
    path = tmp_path / "weights"
    write_weights(path, Weights("ff", 3, layout, {"a": np.array([1, -2], np.float32)}))
    assert path.read_bytes() == content_of(GOLDEN)
    written = read_weights(path)
    path.write_bytes(content_of(re.sub(DIGEST, b"", GOLDEN)))
    assert repr(read_weights(path)) == repr(written)


def test_base_is_the_digest_of_the_content() -> None:
    layout = small_round.layout_of(small_round.layer("fc", (2, 1), kind="dense"))
    tensors = {"b": np.array([[1.0], [-2.0]], np.float32), "a": np.array([0.5], np.float32)}
    content = b"ff 3\n" + b"a\0" + bytes.fromhex("0000003f") + b"b\0" + bytes.fromhex("0000803f 000000c0")
    base = Weights("ff", 3, layout, tensors).base
    assert base == hashlib.sha256(content).hexdigest()
    others = [
        Weights("fe", 3, layout, tensors),
        Weights("ff", 4, layout, tensors),
        Weights("ff", 3, layout, {**tensors, "a": np.array([0.25], np.float32)}),
    ]
    assert base not in {other.base for other in others}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    tensors = small_round.random_tensors(small_round.LAYOUT, 1)
    write_weights(path, Weights("ab" * 32, 7, small_round.LAYOUT, tensors))
    found = read_weights(path)
    assert (found.fingerprint, found.round, found.layout) == ("ab" * 32, 7, small_round.LAYOUT)
    assert found.base == Weights("ab" * 32, 7, small_round.LAYOUT, tensors).base
    assert found.tensors.keys() == tensors.keys() == load_file(path).keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value, strict=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, value: float) -> None:
    path = tmp_path / "base.safetensors"
    weights = small_round.start_round(tmp_path)
    before = path.read_bytes()
    tensors = dict(weights.tensors)
    tensors["fc.x1"] = np.full((6, 2), value, np.float32)
    with pytest.raises(FedparaError, match=r"'fc.x1': expected finite weights"):
        write_weights(path, dataclasses.replace(weights, tensors=tensors))
    assert path.read_bytes() == before
    rewrite(path, tensors=tensors)
    refused(path, r"'fc.x1': expected finite weights")


def test_tensors_must_fit_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    for change in ("missing", "extra", "shape", "dtype"):
        tensors: dict[str, Any] = dict(small_round.start_round(tmp_path).tensors)
        if change == "missing":
            del tensors["fc.x1"]
        elif change == "extra":
            tensors["fc.x9"] = tensors["fc.x1"]
        else:
            tensors["fc.x1"] = tensors["fc.x1"].T.copy() if change == "shape" else tensors["fc.x1"].astype(np.float64)
        rewrite(path, tensors=tensors)
        refused(path, "'fc.x9'" if change == "extra" else "'fc.x1'")


@pytest.mark.parametrize(
    "changed",
    [
        {"layout": None},
        {"fingerprint": None},
        {"round": None},
        {"round": "three"},
        {"round": "3"},
        {"round": 3.0},
        {"round": 0.5},
        {"round": True},
        {"round": -1},
        {"round": (1 << 40) + 1},
        {"round": [3] * 100_000},
        {"fingerprint": 7},
        {"fingerprint": "\ud800"},
        {"fingerprint": "a\n"},
        {"layout": []},
        {"layout": {"layers": [], "tensors": [{"name": "a"}]}},
        {"layout": {"layers": 3, "tensors": []}},
    ],
    ids=lambda changed: str(changed)[:60].encode("ascii", "backslashreplace").decode(),
)
def test_a_header_must_be_whole(tmp_path: Path, changed: dict[str, Any]) -> None:
    small_round.start_round(tmp_path)
    rewrite(tmp_path / "base.safetensors", **changed)
    refused(tmp_path / "base.safetensors", "expected the header of a weights file")


def test_a_round_beyond_the_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    text = '{"fingerprint":"ff","format":"fedpara-edge/weights","layout":LAYOUT,"round":1e999,"version":1}'
    text = text.replace("LAYOUT", '{"layers":[],"tensors":[]}')
    save_file({}, path, metadata={"fedpara_edge": text})
    refused(path, "expected the header of a weights file, found round inf where")


def test_other_files(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    update = small_round.send(tmp_path, weights, "a")
    refused(update, "expected fedpara-edge/weights, found fedpara-edge/update; check the order of the arguments")
    refused(tmp_path, "expected a readable file")
    with pytest.raises(InputError, match="missing: expected a readable file, found No such file"):
        read_weights(tmp_path / "missing")
    (tmp_path / "text").write_text("hello, this is text")
    refused(tmp_path / "text", "expected fedpara-edge/weights, found a text file; check the path")
    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    refused(
        tmp_path / "data.npz", "expected fedpara-edge/weights, found an .npz archive of numpy arrays; check the path"
    )


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4", "uniform:step=0.5,by=tensor"])
def test_encoded_weights_are_those_that_every_reader_gets(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "encoded"
    weights = small_round.start_round(tmp_path)
    written = write_weights(path, weights, find_encoder(codec))
    read = read_weights(path)
    assert read.base == written.base
    for name, tensor in weights.tensors.items():
        assert read.tensors[name].dtype == np.float32
        assert np.array_equal(read.tensors[name], written.tensors[name])
        assert norm(read.tensors[name] - tensor) <= 0.3 * norm(tensor)
    assert (read.base == weights.base) == (codec == "float32")


def test_float32_needs_no_mention_of_a_codec(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    write_weights(tmp_path / "named", weights, find_encoder("float32"))
    assert (tmp_path / "named").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


def test_damaged_encoded_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoded"
    write_weights(path, small_round.start_round(tmp_path), find_encoder("int4"))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"int4", b"int5"))
    refused(path, "expected one of the codecs float32 version 1, .*, found .*int5")
    path.write_bytes(whole[:-1])
    refused(path, "expected a whole safetensors file")
    rewrite_header = whole.replace(b'\\"shape\\":[6,2]', b'\\"shape\\":[7,2]')
    assert rewrite_header != whole
    path.write_bytes(rewrite_header)
    refused(path, "expected")


@pytest.mark.parametrize("shape", [(5_000_000,), (1 << 60,)], ids=str)
def test_small_weights_make_nobody_allocate(tmp_path: Path, shape: tuple[int, ...]) -> None:
    layout = Layout((), (small_round.tensor("a", shape),))
    header = {"format": "fedpara-edge/weights", "version": 1, "fingerprint": "ff", "round": 0}
    codec = {"name": "uniform", "version": 1, "block": 0}
    write_tensors(
        tmp_path / "bomb",
        {"payload": np.zeros(4000, np.uint8)},
        {**header, "layout": layout.to_json(), "codec": codec},
    )
    tracemalloc.start()
    refused(tmp_path / "bomb", "expected at most 256 entries for each of its 4.* bytes, found")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("parts", [("base",), ("base", "u", "v"), ("mask",), ("u", "v"), ("velocity",)], ids="+".join)
@pytest.mark.parametrize("layer", ["fc", "elsewhere"])
def test_what_only_updates_have_is_refused_elsewhere(tmp_path: Path, parts: tuple[str, ...], layer: str) -> None:
    roles = {"base": "base", "mask": "drawn", "velocity": "velocity"}
    tensors = [small_round.tensor(part, (6, 5), layer, part, roles.get(part, "shared")) for part in parts]
    layout = Layout((small_round.layer("fc", (6, 5), kind="dense"),), (small_round.tensor("w", (2,)), *tensors))
    for number in (0, 1):
        header = {"format": "fedpara-edge/weights", "version": 1, "fingerprint": "ff", "round": number}
        values = {tensor.name: np.ones(tensor.shape, np.float32) for tensor in layout.tensors}
        write_tensors(tmp_path / "w", values, {**header, "layout": layout.to_json()})
        refused(tmp_path / "w", "expected a layer of kind update for one of part")


def test_a_tensor_that_no_file_can_hold_is_in_no_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tensor '__metadata__': expected another name"):
        small_round.tensor("__metadata__", (3,))
    layout = Layout((), (small_round.tensor("__something__", (3,)),)).to_json()
    layout["tensors"][0]["name"] = "__metadata__"
    header = {"format": "fedpara-edge/weights", "version": 1, "fingerprint": "ff", "round": 0, "layout": layout}
    codec = {"name": "uniform", "version": 1, "block": 0}
    write_tensors(tmp_path / "w", {"payload": np.zeros(9, np.uint8)}, {**header, "codec": codec})
    refused(tmp_path / "w", "expected another name")
