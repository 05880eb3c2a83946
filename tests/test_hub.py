"""Bundles and weights pushed to a Hub and pulled from it, by huggingface_hub itself from a local stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Command
from hub_server import TOKEN, Hub, serving_hub
from small_net import SmallBundle

from fedpara_edge.formats.bundle import Bundle, open_bundle
from fedpara_edge.formats.weights import read_weights, write_weights

NAME = "me/digits"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving_hub() as hub:
        for name, value in (("HF_ENDPOINT", hub.address), ("HF_TOKEN", TOKEN), ("HF_HOME", str(tmp_path / "hf"))):
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def bundle(small_bundle: SmallBundle) -> Bundle:
    return small_bundle()


def weights_of(bundle: Bundle, round: int, path: Path, *, fingerprint: str | None = None) -> Path:
    first = read_weights(bundle.file("weights.safetensors"))
    write_weights(path, replace(first, round=round, fingerprint=fingerprint or first.fingerprint))
    return path


def test_what_is_pushed_is_pulled(hub: Hub, bundle: Bundle, tmp_path: Path, run: Command) -> None:
    pushed = run("push", bundle.path, NAME, "--private", "--json")
    assert pushed.code == 0, pushed.err
    assert json.loads(pushed.out)["commit"].startswith(f"{hub.address}/{NAME}/commit/")
    assert (hub.private, len(hub.commits)) == ({NAME}, 1)
    assert hub.repositories[NAME].keys() == {*bundle.manifest.files, "manifest.json", "README.md"}

    for number in (2, 10):
        path = weights_of(bundle, number, tmp_path / f"{number}.safetensors")
        assert run("push", path, NAME).code == 0
    assert run("pull", NAME, "-o", tmp_path / "pulled").code == 0
    assert open_bundle(tmp_path / "pulled").manifest == bundle.manifest
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == {*bundle.manifest.files, "manifest.json"}

    newest = run("pull", NAME, "--weights", "-o", tmp_path / "newest.safetensors")
    assert (newest.code, newest.out) == (0, f"{tmp_path / 'newest.safetensors'}: weights after 10 rounds\n")
    assert (tmp_path / "newest.safetensors").read_bytes() == (tmp_path / "10.safetensors").read_bytes()
    assert run("pull", NAME, "-o", tmp_path / "pulled").code == 7
    assert run("pull", NAME, "-o", tmp_path / "pulled", "--if-missing").code == 0


def test_without_rounds_the_newest_weights_are_the_initial_ones(
    hub: Hub, bundle: Bundle, tmp_path: Path, run: Command
) -> None:
    assert run("push", bundle.path, NAME).code == 0
    assert run("pull", NAME, "--weights", "-o", tmp_path / "w.safetensors").code == 0
    assert read_weights(tmp_path / "w.safetensors").round == 0
    assert not hub.private


def test_the_card_tells_what_the_manifest_does_and_somebody_elses_stays(hub: Hub, bundle: Bundle, run: Command) -> None:
    assert run("push", bundle.path, NAME).code == 0
    files, manifest = hub.repositories[NAME], bundle.manifest
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: fedpara-edge\n")
    for text in (manifest.fingerprint, f"{manifest.layout.shared_parameters:,}", manifest.layout.layers[0].name):
        assert text in card
    files["README.md"] = b"old\n" + card.encode()
    assert run("push", bundle.path, NAME).err == ""
    assert files["README.md"].decode() == card
    files["README.md"] = b"# Mine\n"
    assert "has a model card of its own, which stays" in run("push", bundle.path, NAME).err
    assert files["README.md"] == b"# Mine\n"


def test_weights_of_another_bundle_are_refused(hub: Hub, bundle: Bundle, tmp_path: Path, run: Command) -> None:
    assert run("push", bundle.path, NAME).code == 0
    other = weights_of(bundle, 1, tmp_path / "other.safetensors", fingerprint="0" * 64)
    refused = run("push", other, NAME)
    assert (refused.code, "expected weights of the bundle in me/digits" in refused.err) == (6, True)
    hub.repositories[NAME]["weights/round-1.safetensors"] = other.read_bytes()
    assert run("pull", NAME, "--weights", "-o", tmp_path / "w.safetensors").code == 6
    assert not (tmp_path / "w.safetensors").exists()


def test_what_comes_damaged_is_refused_and_nothing_is_left(
    hub: Hub, bundle: Bundle, tmp_path: Path, run: Command
) -> None:
    assert run("push", bundle.path, NAME).code == 0
    hub.repositories[NAME]["weights.safetensors"] += b" "
    before = set(tmp_path.iterdir())
    refused = run("pull", NAME, "-o", tmp_path / "pulled")
    assert (refused.code, "expected the content that manifest.json lists" in refused.err) == (6, True)
    assert set(tmp_path.iterdir()) == before


def test_errors_of_the_hub_are_one_line(
    hub: Hub, bundle: Bundle, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(bundle, 1, tmp_path / "1.safetensors")
    cases = [
        (("push", tmp_path / "none", NAME), "expected"),
        (("push", bundle.path, "me/two/three"), "OWNER/NAME"),
        (("push", weights, "me/none"), "me/none: expected a repository that this token may use"),
        (("pull", "me/none", "-o", tmp_path / "o"), "me/none: expected a repository that this token may use"),
    ]
    hub.repositories["me/empty"] = {}
    cases += [
        (("pull", "me/empty", "-o", tmp_path / "o"), "me/empty: expected a bundle, found a file of it missing"),
        (("push", weights, "me/empty"), "me/empty: expected a bundle, found a file of it missing"),
    ]
    for arguments, text in cases:
        refused = run(*arguments)
        assert refused.code not in (0, 70), refused.err
        assert text in refused.err
        assert refused.err.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "me/digits: expected the Hub to take this, found" in run("push", bundle.path, NAME).err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "expected to reach the Hub" in run("pull", NAME, "-o", tmp_path / "o").err
    assert not (tmp_path / "o").exists()
