"""A manifest that anybody may have written, fingerprint included: every field of a wrong type is refused by name."""

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_bundle import INTERFACE, MANIFEST_OF_THE_TEST, folder  # noqa: F401  (a fixture)

from fedpara_edge.errors import WrongBundleError
from fedpara_edge.formats.bundle import MANIFEST, open_bundle, write_manifest

ODD = [None, True, -1, 1.5, 10**400, "x", "\ud800", [], {}, [[]], {"x": None}]
NULLABLE = {"local", "classes"}
KINDS: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,), list: (list,), dict: (dict,)}


@pytest.fixture(params=["schema 1", "schema 2"])
def manifest(folder: Path, request: pytest.FixtureRequest) -> Path:  # noqa: F811
    """The manifest of a small bundle, with an optimizer that has constants of all kinds."""
    interface = INTERFACE
    if request.param == "schema 2":
        label = dataclasses.replace(INTERFACE.labels[0], class_names=("a", "b", "c"))
        head = dataclasses.replace(INTERFACE.heads[0], label=label)
        interface = dataclasses.replace(INTERFACE, heads=(head,), others=INTERFACE.outputs)
    optimizer = {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    write_manifest(folder, dataclasses.replace(MANIFEST_OF_THE_TEST, optimizer=optimizer, interface=interface))
    return folder / MANIFEST


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to every value in JSON data; of lists, to the first of what they hold."""
    items = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in items:
        if key == "fingerprint":  # which `forge` makes right
            continue
        yield (*at, key)
        yield from places(value, (*at, key))


def forge(path: Path, data: dict[str, Any]) -> None:
    """Write a manifest with the fingerprint that it should have."""
    agreed = {name: value for name, value in data.items() if name not in ("model", "engines", "files", "fingerprint")}
    text = json.dumps(agreed, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**data, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}))


def test_what_is_forged_alone_opens(manifest: Path) -> None:
    before = open_bundle(manifest.parent).manifest
    forge(manifest, json.loads(manifest.read_text()))
    assert open_bundle(manifest.parent).manifest == before


def test_a_field_of_a_wrong_type_is_refused(manifest: Path) -> None:
    original = json.loads(manifest.read_text())
    tried = 0
    for place in places(original):
        for odd in ODD:
            data = copy.deepcopy(original)
            *parents, last = place
            parent = data
            for key in parents:
                parent = parent[key]
            kind = type(parent[last])
            right = (type(odd) in KINDS.get(kind, (kind,)) and (odd != "\ud800" or "class_names" in place)) or (
                last in NULLABLE and (odd is None or type(odd) in (int, str))
            )
            parent[last] = odd
            forge(manifest, data)
            tried += 1
            try:
                opened = open_bundle(manifest.parent).manifest
            except WrongBundleError as error:
                assert str(error).isprintable(), (place, odd)  # noqa: PT017
                assert len(str(error)) < 600 + len(str(manifest))  # noqa: PT017
            else:
                assert right, (place, odd)
                assert json.loads(json.dumps(opened._plain())) == {
                    name: value for name, value in data.items() if name != "fingerprint"
                }
    assert tried > 300


@pytest.mark.parametrize("value", [10**400, 1 << 40, True])
def test_numbers_that_nobody_means(manifest: Path, value: int) -> None:
    original = json.loads(manifest.read_text())
    label = original["label"] if "label" in original else original["heads"][0]["label"]
    label["classes"] = value
    forge(manifest, original)
    with pytest.raises(WrongBundleError, match=r"an array of .* classes"):
        open_bundle(manifest.parent)


def test_a_digest_of_another_type_is_named(manifest: Path) -> None:
    shutil.copy(manifest, manifest.with_name("kept"))
    for wrong in ({"sha256": 5, "bytes": 3}, {"sha256": "0", "bytes": "3"}, {"sha256": "0", "bytes": -1}):
        data = json.loads(manifest.with_name("kept").read_text())
        data["files"]["weights.safetensors"] = wrong
        forge(manifest, data)
        with pytest.raises(WrongBundleError, match=r"expected the fields of schema [12], found files "):
            open_bundle(manifest.parent)
