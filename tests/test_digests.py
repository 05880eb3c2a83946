"""Every file states a digest of itself: a value that was flipped is never read, and older files are read without."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small_round
from command_line import Command
from test_prediction import linear_model

from device_runtime.statefiles import (
    Committed,
    Progress,
    read_committed,
    read_progress,
    write_committed,
    write_progress,
)
from fedpara_edge.algorithms import find_server
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.folded import DIGEST_KEY, read_folded, with_digest
from fedpara_edge.formats.serverstate import read_server_state, state_of, write_server_state
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.storage.digest import content_digest
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

LAYOUT = Layout((), (small_round.tensor("a", (2,)), small_round.tensor("b", (3,))))
WEIGHTS = Weights("ff", 3, LAYOUT, small_round.random_tensors(LAYOUT, 0))
CALL = {"round": 3, "base": "ab"}
GROUPS = {"personal": {"a": np.ones(2, np.float32)}, "residual": {"b": np.arange(3, dtype=np.float32)}}
STATE = state_of(WEIGHTS, find_server("fedavgm"), {"momentum": WEIGHTS.tensors, "residual": WEIGHTS.tensors})
PROGRESS = Progress(call=CALL, output="/u", step=7, seconds=1.25, loss_sums=(0.1,), groups=GROUPS)


@dataclass(frozen=True)
class Format:
    """A format: how a small file is written and read."""

    write: Callable[[Path], object]
    read: Callable[[Path], Any]


FORMATS = {
    "weights": Format(lambda path: write_weights(path, WEIGHTS), read_weights),
    "encoded weights": Format(lambda path: write_weights(path, WEIGHTS, find_encoder("int8")), read_weights),
    "server state": Format(lambda path: write_server_state(path, STATE), read_server_state),
    "control variate": Format(
        lambda path: write_server_state(path, STATE), lambda path: read_server_state(path, only=("momentum",))
    ),
    "device state": Format(
        lambda path: write_committed(path, Committed(call=CALL, before=GROUPS, after=GROUPS), "ff"),
        lambda path: read_committed(path, "ff"),
    ),
    "progress": Format(lambda path: write_progress(path, PROGRESS, "ff"), lambda path: read_progress(path, "ff")),
    "folded": Format(
        lambda path: path.write_bytes(with_digest(linear_model().SerializeToString(deterministic=True))),
        lambda path: read_folded(path)[0],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_bit_is_refused_or_does_no_harm(name: str, tmp_path: Path) -> None:
    """No harm: in the name of the digest itself, which then is an unknown field."""
    path, format = tmp_path / "file", FORMATS[name]
    format.write(path)
    content, expected = path.read_bytes(), repr(format.read(path))
    accepted, messages = [], []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = format.read(path)
        except FedparaError as error:
            messages.append(str(error))
            continue
        accepted.append(place)
        assert repr(found) == expected, content[place - 20 : place + 20]
    assert len(accepted) <= len(DIGEST_KEY)
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "folded"])
def test_the_digest_is_that_of_the_definition(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    FORMATS[name].write(path)
    with TensorFile(path, format=None, error=InputError) as file:
        header, tensors = dict(file.header), {name: file.read(name) for name in file.entries}
    content = read_weights(path).base if "weights" in name else content_digest(tensors)
    digest = header.pop("digest")
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(f"{text}\n{content}".encode()).hexdigest()


def test_the_digest_of_tensors_is_that_of_the_definition() -> None:
    tensors = {"b": np.array([[1.0, -2.0]], np.float32), "a": np.array(3, np.int64)}
    content = b"a\0int64 []\0" + bytes.fromhex("0300000000000000") + b"b\0float32 [1, 2]\0"
    assert content_digest(tensors) == hashlib.sha256(content + bytes.fromhex("0000803f 000000c0")).hexdigest()


def test_the_digest_of_a_folded_model_is_its_last_entry(tmp_path: Path) -> None:
    path, model = tmp_path / "file", linear_model()
    FORMATS["folded"].write(path)
    loaded = onnx.load(path)
    last = loaded.metadata_props.pop()
    assert loaded == model
    assert (last.key, last.value) == (DIGEST_KEY, hashlib.sha256(loaded.SerializeToString()).hexdigest())


def without_digest(path: Path) -> None:
    """Write a file as the releases up to 0.2 did."""
    if path.suffix == ".onnx":
        path.write_bytes(linear_model().SerializeToString())
        return
    with TensorFile(path, format=None, error=InputError) as file:
        header = {name: value for name, value in file.header.items() if name != "digest"}
        tensors = {name: file.read(name) for name in file.entries}
    write_tensors(path, tensors, header)


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_older_releases_are_read_and_inspect_says_so(name: str, tmp_path: Path, run: Command) -> None:
    path, format = tmp_path / ("file.onnx" if name == "folded" else "file"), FORMATS[name]
    format.write(path)
    expected = repr(format.read(path))
    shown = run("inspect", path, "--json").json["digest"]
    assert len(shown) == 64
    assert f"  digest: {shown}\n" in run("inspect", path).out
    without_digest(path)
    assert repr(format.read(path)) == expected
    assert run("inspect", path, "--json").json["digest"] is None
    assert "  digest: none, as a release up to 0.2 wrote it: damage" in run("inspect", path).out


def test_what_was_damaged_is_said(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "file"
    write_weights(path, WEIGHTS)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        WrongBundleError, match=r"expected content with the digest [0-9a-f]{12}…, found other content: "
    ) as e:
        read_weights(path)
    assert e.value.code == "digest"
    ended = run("inspect", path)
    assert (ended.code, ended.out) == (6, "")
    assert "it was changed or damaged; use weights written by export or aggregate" in ended.err


def test_updates_state_a_digest_of_their_header(tmp_path: Path, run: Command) -> None:
    """And sums of their change, which `test_update` has."""
    weights = small_round.start_round(tmp_path)
    update = small_round.send(tmp_path, weights, "a")
    with TensorFile(update, format=None, error=InputError) as file:
        stated = file.header["digest"]
    assert run("inspect", update, "--json").json["digest"] == stated
    update.write_bytes(update.read_bytes().replace(b"examples", b"exbmples"))
    refused = run("inspect", update)
    assert (refused.code, "expected content with the digest" in refused.err) == (2, True)
