"""The bundle folder: complete, unchanged, or refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round

from fedpara_edge.errors import InputError, WrongBundleError
from fedpara_edge.formats.bundle import (
    INITIAL_PERSONAL,
    MANIFEST,
    WEIGHTS,
    Bundle,
    Manifest,
    open_bundle,
    write_initial_personal,
    write_manifest,
)
from fedpara_edge.formats.interface import ArraySpec, Head, Interface
from fedpara_edge.formats.weights import Weights, write_weights
from fedpara_edge.losses import find_loss

INTERFACE = Interface(
    inputs=(ArraySpec("x", (1, 4), "uint8"),),
    heads=(
        Head(ArraySpec("logits", (3,), "float32"), ArraySpec("y", (), "int64", classes=3), find_loss("cross_entropy")),
    ),
)
MANIFEST_OF_THE_TEST = Manifest(
    model="tiny",
    layout=small_round.LAYOUT,
    interface=INTERFACE,
    optimizer={"name": "sgd"},
    engines=("ort-training",),
    graph="0" * 64,
    local=None,
    files={},
)
LOCAL_TENSORS = {t.name: np.ones(t.shape, t.dtype) for t in small_round.LAYOUT.with_role("personal")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    tensors = small_round.random_tensors(small_round.LAYOUT, 1)
    write_weights(folder / WEIGHTS, Weights("0" * 64, 0, small_round.LAYOUT, tensors))
    write_initial_personal(folder, LOCAL_TENSORS)
    (folder / "train_step.onnx").write_bytes(b"graph")
    write_manifest(folder, MANIFEST_OF_THE_TEST)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def refused(folder: Path, text: str) -> None:
    with pytest.raises(WrongBundleError, match=text) as caught:
        open_bundle(folder)
    assert "\n" not in str(caught.value)


def test_a_whole_bundle_opens(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert dataclasses.replace(bundle.manifest, files={}) == MANIFEST_OF_THE_TEST
    assert set(bundle.manifest.files) == {WEIGHTS, INITIAL_PERSONAL, "train_step.onnx"}
    assert bundle.file(WEIGHTS) == folder / WEIGHTS
    local = bundle.read_initial_personal()
    assert local.keys() == LOCAL_TENSORS.keys()
    for name, value in LOCAL_TENSORS.items():
        np.testing.assert_array_equal(local[name], value, strict=True)


def test_a_bundle_without_local_tensors(folder: Path) -> None:
    (folder / INITIAL_PERSONAL).unlink()
    write_initial_personal(folder, {})
    write_manifest(folder, MANIFEST_OF_THE_TEST)
    assert open_bundle(folder).read_initial_personal() == {}


def test_every_changed_file_is_named(folder: Path) -> None:
    for name in (WEIGHTS, INITIAL_PERSONAL, "train_step.onnx"):
        file = folder / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused(folder, f"{name}: expected the content that {MANIFEST} lists")
        file.write_bytes(content + b"x")
        refused(folder, f"{name}: expected the content that {MANIFEST} lists")
        file.unlink()
        refused(folder, f"{name}: expected a file that {MANIFEST} lists, found nothing; copy the whole bundle again")
        file.write_bytes(content)
    open_bundle(folder)


def test_a_file_more_does_no_harm(folder: Path) -> None:
    (folder / "round-1.safetensors").write_bytes(b"")
    assert "round-1.safetensors" not in open_bundle(folder).manifest.files


def test_a_manifest_can_not_name_files_elsewhere(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"")
    for name in ("../secret", str(folder.parent / "secret"), "..", ""):
        edit(folder, lambda data, name=name: data["files"].update({name: {"sha256": "0", "bytes": 0}}))
        refused(folder, f"expected a file that {MANIFEST} lists, found nothing")
        edit(folder, lambda data, name=name: data["files"].pop(name))


def test_what_must_agree_between_devices_is_in_the_fingerprint() -> None:
    fingerprint = MANIFEST_OF_THE_TEST.fingerprint
    same = {"model": "other", "engines": (), "files": {"a": {}}}
    other = {
        "layout": small_round.layout_of(*small_round.LAYERS),
        "interface": dataclasses.replace(INTERFACE, inputs=(ArraySpec("x", (1, 4), "float32"),)),
        "optimizer": {"name": "adamw"},
        "graph": "1" * 64,
        "local": "2" * 64,
    }
    assert same.keys() | other.keys() == {field.name for field in dataclasses.fields(Manifest)}
    for name, value in same.items():
        assert dataclasses.replace(MANIFEST_OF_THE_TEST, **{name: value}).fingerprint == fingerprint, name
    for name, value in other.items():
        assert dataclasses.replace(MANIFEST_OF_THE_TEST, **{name: value}).fingerprint != fingerprint, name


@pytest.mark.parametrize(
    ("field", "value"), [("loss", "mse"), ("fingerprint", "0" * 64), ("fingerprint", None), ("graph", "1" * 64)]
)
def test_a_changed_manifest_is_refused(folder: Path, field: str, value: object) -> None:
    edit(folder, lambda data: data.update({field: value}))
    refused(folder, "expected fingerprint .* it was changed; copy the whole bundle again")


def test_another_schema_is_refused(folder: Path) -> None:
    for value in (5, "1", None):
        edit(folder, lambda data, value=value: data.update(schema=value))
        refused(folder, f"expected schema 1, 2, 3 or 4, found {value}; use the release that exported it")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", {}),
        ("layout", {"layers": [], "tensors": [{}]}),
        ("input", {"shape": 3}),
        ("label", []),
        ("engines", 3),
        ("optimizer", 3),
        ("files", ["weights.safetensors"]),
        ("files", {"weights.safetensors": {"bytes": 3}}),
        ("files", {"weights.safetensors": None}),
    ],
    ids=str,
)
def test_a_malformed_manifest_is_refused(folder: Path, field: str, value: object) -> None:
    edit(folder, lambda data: data.update({field: value}))
    refused(folder, "expected the fields of schema 1")


@pytest.mark.parametrize("field", ["layout", "files", "fingerprint", "loss", "graph"])
def test_a_manifest_without_a_field_is_refused(folder: Path, field: str) -> None:
    edit(folder, lambda data: data.pop(field))
    refused(folder, f"expected the fields of schema 1, found no field '{field}'; copy the whole bundle again")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1, "schema": 1}', "[" * 100_000])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    refused(folder, "expected (JSON|schema 1)")


def test_no_bundle_at_all(folder: Path) -> None:
    with pytest.raises(InputError, match="expected a bundle folder, found nothing; check the path"):
        open_bundle(folder / "missing")
    with pytest.raises(InputError, match="expected a bundle folder, found a file"):
        open_bundle(folder / MANIFEST)
    (folder / MANIFEST).unlink()
    refused(folder, "expected a bundle's manifest")


def test_damaged_local_tensors(folder: Path) -> None:
    (folder / INITIAL_PERSONAL).write_bytes(b"damaged")
    manifest = write_manifest(folder, MANIFEST_OF_THE_TEST)
    with pytest.raises(WrongBundleError, match=f"{INITIAL_PERSONAL}: expected a whole .*; copy the whole bundle again"):
        Bundle(folder, manifest).read_initial_personal()
