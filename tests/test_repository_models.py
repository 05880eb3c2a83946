"""A folded model in a signed repository: `publish --model`, and `predict --repository`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from signed import RUN

from device_runtime.prediction import Predictor
from fedpara_edge.formats.folded import read_folded
from fedpara_edge.trust import repository

SOURCE = ("--repository", "repo", "--root", "root.json", "--cache", "cache")
PUBLISH = ("publish", "repo", "--root", "root.json", "--key", "signer", "--json")


@pytest.fixture
def published(here: Path, run: Command) -> Path:
    """A repository with a bundle and its folded model."""
    assert run("keys", "new", "signer").code == 0
    roles = [f"--{role}-key" for role in ("root", "targets", "timestamp")]
    assert run("keys", "root", *(part for role in roles for part in (role, "signer")), "-o", "root.json").code == 0
    assert run("fold", "bundle", "-o", "model.onnx").code == 0
    ended = run(*PUBLISH, "--bundle", "bundle", "--run", RUN, "--model", "model.onnx")
    assert ended.code == 0, ended.err
    return here


@pytest.mark.usefixtures("published")
def test_predictions_are_those_of_the_published_model(run: Command) -> None:
    ended = run("predict", *SOURCE, "--data", "d.npz", "-o", "p.npz", "--json")
    assert (ended.code, ended.json["examples"]) == (0, 8), ended.err
    assert sorted(path.name for path in Path("cache").glob("*.*")) == ["model.onnx"]  # and no bundle
    assert run("predict", "model.onnx", "--data", "d.npz", "-o", "q.npz").code == 0
    for name, values in np.load("p.npz").items():
        np.testing.assert_array_equal(values, np.load("q.npz")[name])


@pytest.mark.usefixtures("published")
def test_a_changed_model_is_never_run(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = Path("repo/targets/models").glob("*.onnx")
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(Predictor, "__init__", None)
    ended = run("predict", *SOURCE, "--data", "d.npz", "-o", "p.npz")
    assert (ended.code, "expected the content that is signed, found a changed file" in ended.err) == (5, True)
    assert not Path("p.npz").exists()


@pytest.mark.usefixtures("published")
def test_a_model_changed_in_the_cache_is_fetched_again(run: Command) -> None:
    for name in ("p.npz", "q.npz"):
        assert run("predict", *SOURCE, "--data", "d.npz", "-o", name).code == 0
        Path("cache/model.onnx").write_bytes(b"changed")


@pytest.mark.usefixtures("published")
def test_a_new_bundle_comes_without_the_old_model(run: Command) -> None:
    assert run(*PUBLISH, "--bundle", "bundle", "--run", RUN).code == 0
    ended = run("predict", *SOURCE, "--data", "d.npz", "-o", "p.npz")
    assert (ended.code, "expected a folded model in the list of files, found none" in ended.err) == (5, True)


@pytest.mark.usefixtures("published")
def test_a_model_with_what_a_device_keeps_is_not_published(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, content = read_folded(Path("model.onnx"))
    monkeypatch.setattr(repository, "read_folded", lambda _: (replace(spec, personal=True), content))
    ended = run(*PUBLISH, "--model", "model.onnx")
    words = "--model: model.onnx: expected a model for everybody, found one with a device's own personal tensors"
    assert (ended.code, words in ended.err) == (2, True), ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "expected MODEL or --repository, found neither"),
        (("model.onnx", *SOURCE), "expected MODEL or --repository, found both; leave model.onnx out"),
        (("model.onnx", "--cache", "cache"), "--cache: expected with --repository"),
        (SOURCE[:4], "--cache: expected a folder for what was verified, found none; give it"),
    ],
)
@pytest.mark.usefixtures("here")
def test_options_that_do_not_go_together(run: Command, arguments: tuple[str, ...], words: str) -> None:
    ended = run("predict", *arguments, "--data", "d.npz", "-o", "p.npz")
    assert (ended.code, words in ended.err) == (2, True), ended.err
