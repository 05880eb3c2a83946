"""The mean of updates: right, and the same in any order, with any number of threads, and for any number of updates."""

import json
import os
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from means import METRICS, UNIT, codes, constant, written
from safetensors.numpy import load_file, save_file

from fedpara_edge import codecs
from fedpara_edge.aggregation import aggregate
from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.algorithms.adaptive import FedAdam
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.algorithms.feddyn import FedDynServer
from fedpara_edge.algorithms.scaffold import ScaffoldServer
from fedpara_edge.codecs import codec
from fedpara_edge.codecs.codec import Decoder
from fedpara_edge.codecs.float32 import open_float32
from fedpara_edge.errors import InputError, InvalidUpdateError
from fedpara_edge.formats.serverstate import state_of
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.storage.digest import with_digest
from fedpara_edge.storage.tensorfile import TensorFile


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return small_round.start_round(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 7, 45])
def test_the_mean_is_that_of_float64(tmp_path: Path, weights: Weights, count: int, effort: Effort) -> None:
    examples = [1 + 37 * number % 1000 for number in range(count)]
    examples[0] = 1 << 40 if count == 2 else examples[0]
    changes = [small_round.random_tensors(weights.layout, number, 0.1) for number in range(count)]
    paths = [
        small_round.send(tmp_path, weights, f"c{number}", change=change, examples=examples[number])
        for number, change in enumerate(changes)
    ]
    result = aggregate(paths, weights, effort=effort)
    shares = np.array(examples) / sum(examples)
    flat = np.stack([small_round.flat(change) for change in changes])
    base = small_round.flat(weights.tensors)
    expected = base + shares @ flat
    # The stated bound of the mean, and the rounding of the result.
    bound = (effort.block_files + 1) * UNIT * (shares @ np.abs(flat)) + UNIT * np.abs(expected)
    assert (np.abs(small_round.flat(result.weights.tensors) - expected) <= bound).all()


def test_what_the_result_tells(tmp_path: Path, weights: Weights) -> None:
    paths = [
        small_round.send(tmp_path, weights, client, examples=examples, steps=7, metrics={"loss": 0.25})
        for client, examples in (("b", 30), ("a", 10))
    ]
    result = aggregate([*paths, tmp_path / "missing"], weights)
    assert (result.weights.round, result.weights.fingerprint) == (weights.round + 1, weights.fingerprint)
    assert result.weights.layout == weights.layout
    assert list(result.weights.tensors) == list(weights.tensors)
    for name, value in result.weights.tensors.items():
        assert (value.dtype, value.shape) == (np.float32, weights.tensors[name].shape)
    size = paths[0].stat().st_size
    stated = {"steps": 7, "metrics": {"loss": 0.25}, "bytes": size, "norm_in_medians": None, "scale": 1, "bounded": ()}
    for update, path, client, examples in zip(result.accepted, paths[::-1], "ab", (10, 30), strict=True):
        assert vars(update) == {
            "path": path,
            "client": client,
            "examples": examples,
            "share": examples / 40,
            "norm": pytest.approx(np.linalg.norm(small_round.flat(load_file(path)))),
            "sha256": None,
            "staleness": 0,
            **stated,
        }
    assert result.received_bytes == sum(path.stat().st_size for path in paths)
    assert result.dense_bytes == 2 * 4 * weights.layout.dense_parameters
    assert result.share == result.received_bytes / result.dense_bytes
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["examples"] == 40
    assert plain["accepted"][0]["client"] == "a"
    assert plain["rejected"] == [
        {
            "path": str(tmp_path / "missing"),
            "client": None,
            "code": "unreadable",
            "reason": f"{tmp_path / 'missing'}: expected a readable file, found No such file or directory; "
            "check the path",
        }
    ]
    assert plain["gap"]["entries"] > 0
    written(tmp_path, result)
    assert read_weights(tmp_path / "result.safetensors").round == weights.round + 1


def test_nothing_is_changed_in_place(tmp_path: Path, weights: Weights) -> None:
    before = {name: value.copy() for name, value in weights.tensors.items()}
    paths = [small_round.send(tmp_path, weights, client) for client in "ab"]
    content = [path.read_bytes() for path in paths]
    aggregate(paths, weights)
    for name, value in before.items():
        np.testing.assert_array_equal(weights.tensors[name], value)
    assert [path.read_bytes() for path in paths] == content


def test_progress_is_told_block_by_block(tmp_path: Path, weights: Weights) -> None:
    calls: list[tuple[int, int]] = []
    paths = [small_round.send(tmp_path, weights, f"c{number}") for number in range(7)]
    effort = Effort(block_files=3)
    aggregate(paths, weights, on_progress=lambda done, total: calls.append((done, total)), effort=effort)
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_the_number_of_threads_changes_no_byte(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "CHUNK_ENTRIES", 16)
    paths = [small_round.send(tmp_path, weights, f"c{number}") for number in range(25)]
    results = []
    for threads in (1, 2, 5):
        result = aggregate(paths, weights, effort=Effort(threads=threads))
        results.append((written(tmp_path, result), result.gap))
    assert results[0] == results[1] == results[2]


@dataclass(frozen=True)
class Shifted:
    """The decoder of another codec, which stores one more than the change and refuses files by their name."""

    inner: Decoder
    file: TensorFile

    def decode(self, start: int, out: Any) -> None:
        if start and self.file.path.name == "bad":
            raise InvalidUpdateError(f"{self.file.path}: expected a code word, found none", code="code_word")
        self.inner.decode(start, out)
        out -= 1


def test_codecs_can_be_mixed_and_can_refuse(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = lambda file, tensors, settings: Shifted(open_float32(file, tensors, settings), file)  # noqa: E731
    monkeypatch.setattr(codecs, "OPENERS", {**codecs.OPENERS, ("shifted", 1): opener})
    monkeypatch.setattr(codec, "CHUNK_ENTRIES", 16)
    shifted = {"codec": {"name": "shifted", "version": 1}}
    changes = {name: small_round.random_tensors(weights.layout, ord(name), 0.1) for name in "abcdef"}
    paths = []
    for name, change in changes.items():
        stored = (
            {key: np.add(tensor, 1, out=np.empty_like(tensor)) for key, tensor in change.items()}
            if name in "ace"
            else change
        )
        fields = shifted if name in "ace" else {}
        paths.append(small_round.forge(tmp_path / name, weights, client=name, tensors=stored, **fields))
    bad = small_round.forge(tmp_path / "bad", weights, client="bad", **shifted)
    result = aggregate([*paths, bad], weights)
    assert [update.client for update in result.accepted] == list("abcdef")
    assert codes(result.rejected) == {"bad": "code_word"}
    expected = np.mean([small_round.flat(change) for change in changes.values()], axis=0)
    moved = small_round.flat(result.weights.tensors) - small_round.flat(weights.tensors)
    np.testing.assert_allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize("pieces", [5, 1 << 18])
def test_the_pieces_of_a_step_change_nothing(pieces: int, tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    paths = [small_round.send(tmp_path, weights, client, metrics=METRICS) for client in "abc"]
    kept = state_of(weights, FedAdam(), {"moment1": weights.tensors, "moment2": constant(weights, 2.0)})
    expected = aggregate(paths, weights, algorithm=FedAdam(), state=kept)
    found = aggregate(paths, weights, algorithm=FedAdam(), state=kept, effort=Effort(piece_entries=pieces))
    assert written(tmp_path, found) == written(tmp_path, expected)


def test_equal_weighting_ignores_the_examples(tmp_path: Path, weights: Weights) -> None:
    changes = {"a": 1.0, "b": 4.0}
    paths = [
        small_round.send(tmp_path, weights, client, change=constant(weights, value), examples=1 + 98 * (client == "a"))
        for client, value in changes.items()
    ]
    for weighting, expected in (("equal", 2.5), ("examples", 1.03), (None, 1.03)):
        result = aggregate(paths, weights, weighting=weighting)
        moved = small_round.flat(result.weights.tensors) - small_round.flat(weights.tensors)
        np.testing.assert_allclose(moved, expected, atol=1e-6)
        assert result.weighting == (weighting or "examples")


def many(folder: Path, weights: Weights, count: int, *, codec: str = "float32") -> list[Path]:
    """Copies of one update that differ in their client, which is much faster than writing each."""
    first = small_round.send(folder, weights, "client", codec=codec, metrics=METRICS)
    with TensorFile(first, format=None, error=InvalidUpdateError) as file:
        fields = {name: value for name, value in file.header.items() if name != "digest"}
    paths, arrays = [], load_file(first)
    for number in range(count):
        path = folder / f"many-{number:04}"
        header = with_digest({**fields, "client": f"client-{number:04}"}, "")
        save_file(arrays, path, metadata={"fedpara_edge": json.dumps(header)})
        paths.append(path)
    return paths


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of open files to lower")
def test_more_updates_than_files_may_be_open(tmp_path: Path, weights: Weights) -> None:
    import resource

    paths = many(tmp_path, weights, 500)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/dev/fd")))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + USUAL.block_files + 8, hard))
    try:
        assert len(aggregate(paths, weights).accepted) == 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_refitting_brings_the_weights_closer_to_their_mean(tmp_path: Path, weights: Weights) -> None:
    paths = [small_round.send(tmp_path, weights, client, examples=ord(client)) for client in "abc"]
    mean, refitted = aggregate(paths, weights), aggregate(paths, weights, merge="refit")
    assert mean.refit is None
    assert refitted.refit is not None
    assert refitted.refit.after < 0.5 * refitted.refit.before
    assert mean.gap is not None
    assert mean.gap.relative == pytest.approx(refitted.refit.before)
    assert refitted.to_json()["refit"] == {"before": refitted.refit.before, "after": refitted.refit.after}
    for name, tensor in mean.weights.tensors.items():
        part = name.rpartition(".")[2]
        same = np.array_equal(tensor, refitted.weights.tensors[name])
        assert same == (part in ("bias", "weight", "scale") or name == "scale"), name
    with pytest.raises(InputError, match="merge: expected mean with algorithm feddyn, found refit"):
        aggregate(paths, weights, merge="refit", algorithm=FedDynServer(clients=3))
    moved = aggregate(paths, weights, merge="refit", algorithm=FedAvgServer(lr=0.5)).weights.tensors
    for name, tensor in weights.tensors.items():
        np.testing.assert_allclose(moved[name] - tensor, (refitted.weights.tensors[name] - tensor) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "codec"),
    [
        (FedAvgServer(), "float32"),
        (ScaffoldServer(clients=120), "float32"),
        (FedAdam(), "float32"),
        (FedAvgServer(), "int8"),
        (FedAvgServer(), "int4"),
        (FedAvgServer(), "uniform"),
        (FedAvgServer(), "topk"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_memory_does_not_grow_with_the_number_of_updates(
    algorithm: ServerAlgorithm, codec: str, tmp_path: Path
) -> None:
    layout = small_round.layout_of(small_round.layer("conv", (128, 128, 3, 3), rank=40))
    weights = small_round.start_round(tmp_path, layout, number=0)
    paths = many(tmp_path, weights, 120, codec=codec)
    peaks = []
    for count in (20, 40, 120):
        tracemalloc.start()
        aggregate(paths[:count], weights, algorithm=algorithm)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 4 * weights.layout.shared_parameters * (120 - 40) > 15_000_000
    assert abs(peaks[2] - peaks[1]) < 1_000_000
