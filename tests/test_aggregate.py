"""The mean of updates: right, the same in any order, and untouched by whatever was refused."""

import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fedpara_edge import codecs
from fedpara_edge.aggregation import Aggregation, aggregate, screening
from fedpara_edge.aggregation.bounds import UNBOUNDED
from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.algorithms.adaptive import FedAdagrad, FedAdam
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.algorithms.fedavgm import FedAvgM
from fedpara_edge.algorithms.feddyn import FedDynServer
from fedpara_edge.algorithms.scaffold import ScaffoldServer
from fedpara_edge.codecs import codec
from fedpara_edge.codecs.codec import Decoder
from fedpara_edge.codecs.float32 import open_float32
from fedpara_edge.errors import FedparaError, InputError, InvalidUpdateError, TooFewUpdatesError, WrongBundleError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.serverstate import state_of, write_server_state
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.storage.digest import with_digest
from fedpara_edge.storage.tensorfile import TensorFile

HUGE = float(np.finfo(np.float32).max)
UNIT = 2.0**-24


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return small_round.start_round(tmp_path)


@pytest.fixture(params=["as they are", "small blocks and chunks"])
def effort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Effort:
    if request.param == "as they are":
        return USUAL
    monkeypatch.setattr(codec, "CHUNK_ENTRIES", 16)
    return Effort(block_files=3)


def written(folder: Path, result: Aggregation) -> bytes:
    path = folder / "result.safetensors"
    write_weights(path, result.weights)
    return path.read_bytes()


def codes(rejected: Iterable[Any]) -> dict[str, str]:
    return {update.path.name: update.code for update in rejected}


def constant(weights: Weights, value: float) -> dict[str, Any]:
    return {t.name: np.full(t.shape, value, np.float32) for t in weights.layout.shared}


def forge_value(folder: Path, weights: Weights, client: str, value: float, name: str = "head.weight") -> Path:
    change = small_round.random_tensors(weights.layout, 8, 0.1)
    change[name].reshape(-1)[-1] = value
    return small_round.forge(folder / f"{client}.update", weights, tensors=change, client=client)


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


class Round:
    """Weights, good updates of many clients and bad ones of every kind, and what the good ones alone give."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.weights = small_round.start_round(folder)
        self.good = [small_round.send(folder, self.weights, name) for name in ("ä", "b", "B", "a10", "a9", "z", "日")]
        self.bad = every_bad_file(folder, self.weights)
        self.bytes = written(folder, aggregate(self.good, self.weights))


def every_bad_file(folder: Path, weights: Weights) -> dict[Path, tuple[str, str | None]]:
    """A file for every reason to refuse it: its code, and the client that is named with it."""
    good = small_round.random_tensors(weights.layout, 2, 0.1)
    elsewhere = {"fingerprint": "0" * 64}, {"round": 2}, {"base": "0" * 64}
    result: dict[Path, tuple[str, str | None]] = {folder: ("unreadable", None), folder / "none": ("unreadable", None)}

    def forge(code: str, named: str | None = "mallory", **changed: Any) -> None:
        path = small_round.forge(folder / f"bad-{len(result)}", weights, **changed)
        result[path] = code, named

    for changed in elsewhere:
        forge(f"wrong_{next(iter(changed))}", "eve", client="eve", **changed)
    forge("examples", examples=0)
    forge("examples", examples=-3)
    forge("header", metrics={"loss": "x"})
    forge("header", None, client="a\nb")
    forge("header", None, drop="client")
    forge("unknown_codec", codec={"name": "zip", "version": 1})
    forge("wrong_format", None, format="fedpara-edge/weights")
    forge("missing_tensor", tensors={name: good[name] for name in good if name != "conv.t1"})
    forge("extra_tensor", tensors={**good, "../x": good["conv.t1"]})
    forge("shape", tensors={**good, "conv.bias": np.zeros((4, 1), np.float32)})
    forge("dtype", tensors={**good, "conv.bias": np.zeros(4, np.float64)})
    for number, value in enumerate((np.nan, np.inf, -np.inf)):
        name = ("conv.bias", "scale", "own.y1")[number]
        path = forge_value(folder, weights, f"nan-{number}", value, name)
        result[path] = "not_finite", f"nan-{number}"
    whole = small_round.send(folder, weights, "whole").read_bytes()
    for number, content in enumerate((whole[:-1], whole[:100], b"")):
        path = folder / f"truncated-{number}"
        path.write_bytes(content)
        result[path] = "truncated", None
    (folder / "text").write_text("this is no update at all")
    result[folder / "text"] = "not_safetensors", None
    for name in ("one", "two"):
        path = small_round.send(folder, weights, "twice", name=name, examples=5 if name == "one" else 6)
        result[path] = "conflict", "twice"
    return result


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Round:
    return Round(tmp_path_factory.mktemp("round"))


@pytest.fixture
def chunked(effort: Effort, tmp_path: Path) -> Round:  # noqa: ARG001
    """A round whose files have the chunks of the effort."""
    return Round(tmp_path / "round")


@settings(max_examples=25)
@given(st.data())
def test_order_changes_no_byte(everything: Round, data: st.DataObject) -> None:
    paths = data.draw(st.permutations(everything.good))
    assert written(everything.folder, aggregate(paths, everything.weights)) == everything.bytes


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.data())
def test_bad_updates_are_named_and_leave_no_trace(paths: st.DataObject, effort: Effort, chunked: Round) -> None:
    everything = chunked
    bad = paths.draw(st.lists(st.sampled_from(sorted(everything.bad)), unique=True))
    if any(code == "conflict" for code, _ in map(everything.bad.__getitem__, bad)):
        bad = sorted({*bad, everything.folder / "one.update", everything.folder / "two.update"})
    result = aggregate(paths.draw(st.permutations([*everything.good, *bad])), everything.weights, effort=effort)
    alone = aggregate(everything.good, everything.weights, effort=effort)
    assert written(everything.folder, result) == written(everything.folder, alone)
    assert result.accepted == alone.accepted
    assert result.gap == alone.gap
    assert [update.path for update in result.rejected] == sorted(bad, key=str)
    for update in result.rejected:
        assert (update.code, update.client) == everything.bad[update.path]
        assert update.reason.startswith(f"{update.path}: ")
        assert "\n" not in update.reason


def test_every_bad_update_at_once(everything: Round) -> None:
    result = aggregate([*everything.bad, *everything.good], everything.weights)
    assert written(everything.folder, result) == everything.bytes
    assert {update.path: (update.code, update.client) for update in result.rejected} == everything.bad


def test_strict_raises_the_error_of_the_first_by_path(everything: Round) -> None:
    assert aggregate(everything.good, everything.weights, strict=True).rejected == ()
    for path, (code, _) in everything.bad.items():
        paths = [*everything.good, path]
        if code == "conflict":
            paths += [everything.folder / "one.update", everything.folder / "two.update"]
        with pytest.raises(FedparaError) as caught:
            aggregate(paths, everything.weights, strict=True)
        assert caught.value.code == code
        kind = WrongBundleError if code in ("wrong_fingerprint", "wrong_round", "wrong_base") else InvalidUpdateError
        assert type(caught.value) is kind
        assert caught.value.exit_code == (6 if kind is WrongBundleError else 3)
    for paths in (list(everything.bad), list(everything.bad)[::-1]):
        with pytest.raises(FedparaError) as caught:
            aggregate(paths, everything.weights, strict=True)
        assert str(caught.value).startswith(f"{everything.folder}: ")


def test_too_few(everything: Round) -> None:
    with pytest.raises(TooFewUpdatesError, match=r"expected at least 1 valid update, found 0$") as caught:
        aggregate([], everything.weights)
    assert caught.value.exit_code == 4
    assert caught.value.rejected == ()
    assert len(aggregate(everything.good, everything.weights, min_updates=7).accepted) == 7
    nan = everything.folder / "nan-0.update"
    with pytest.raises(
        TooFewUpdatesError, match=r"at least 8 valid updates, found 7; refused 1 \(1 not_finite\)"
    ) as caught:
        aggregate([*everything.good, nan], everything.weights, min_updates=8)
    assert [error.code for error in caught.value.rejected] == ["not_finite"]
    with pytest.raises(TooFewUpdatesError, match=r"found 0; refused 1 \(1 not_finite\), the first: .*'conv.bias'"):
        aggregate([nan], everything.weights)
    with pytest.raises(InputError, match="min_updates: expected at least 1, found 0"):
        aggregate(everything.good, everything.weights, min_updates=0)


def test_the_same_content_of_one_client_counts_once(tmp_path: Path, weights: Weights) -> None:
    a, b = (small_round.send(tmp_path, weights, client) for client in "ab")
    copies = [tmp_path / name for name in ("0-copy", "x-copy")]
    for copy in copies:
        copy.write_bytes(a.read_bytes())
    alone = written(tmp_path, aggregate([a, b], weights))
    for paths in ([a, *copies, b], [copies[1], b, copies[0], a]):
        result = aggregate(paths, weights)
        assert written(tmp_path, result) == alone
        assert [update.path for update in result.accepted] == [copies[0], b]
        assert codes(result.rejected) == {"a.update": "duplicate", "x-copy": "duplicate"}
        assert f"found the content of {copies[0]} again" in result.rejected[0].reason


def test_the_same_path_twice_is_a_duplicate(tmp_path: Path, weights: Weights) -> None:
    a = small_round.send(tmp_path, weights, "a")
    result = aggregate([a, a, a], weights)
    assert len(result.accepted) == 1
    assert [(update.path, update.code) for update in result.rejected] == [(a, "duplicate")] * 2


def test_different_contents_of_one_client_are_all_refused(tmp_path: Path, weights: Weights) -> None:
    paths = [small_round.send(tmp_path, weights, "a", name=name, steps=int(name)) for name in "123"]
    copy = tmp_path / "4"
    copy.write_bytes(paths[0].read_bytes())
    b = small_round.send(tmp_path, weights, "b")
    for order in ([*paths, copy, b], [b, copy, *paths[::-1]]):
        result = aggregate(order, weights)
        assert [update.client for update in result.accepted] == ["b"]
        assert codes(result.rejected) == dict.fromkeys(("1.update", "2.update", "3.update", "4"), "conflict")


def test_huge_values_that_cancel_are_nobodys_fault(tmp_path: Path, weights: Weights, effort: Effort) -> None:
    changes = {"a": HUGE, "b": -HUGE, "c": HUGE, "d": -HUGE, "e": 0.5}
    paths = [small_round.send(tmp_path, weights, c, change=constant(weights, v)) for c, v in changes.items()]
    result = aggregate(paths, weights, bounds=UNBOUNDED, effort=effort)
    assert result.rejected == ()
    moved = small_round.flat(result.weights.tensors) - small_round.flat(weights.tensors)
    assert np.abs(moved).max() <= 21 * UNIT * HUGE


def test_the_largest_float32_everywhere_stays_finite(tmp_path: Path, effort: Effort) -> None:
    layout = Layout((), (small_round.tensor("a", (300,)),))
    path = tmp_path / "base"
    write_weights(path, Weights("0", 0, layout, {"a": np.zeros(300, np.float32)}))
    weights = read_weights(path)
    paths = [small_round.send(tmp_path, weights, c, change=constant(weights, HUGE)) for c in "abcdefg"]
    result = aggregate(paths, weights, effort=effort)
    assert result.rejected == ()
    np.testing.assert_allclose(result.weights.tensors["a"], HUGE, rtol=1e-6)


def test_a_change_that_makes_weights_infinite_is_refused_by_name(tmp_path: Path, effort: Effort) -> None:
    layout = Layout((), (small_round.tensor("a", (300,)), small_round.tensor("b", (3,))))
    path = tmp_path / "base"
    base = {"a": np.zeros(300, np.float32), "b": np.full(3, 0.9 * HUGE, np.float32)}
    write_weights(path, Weights("0", 0, layout, base))
    weights = read_weights(path)
    good = [small_round.send(tmp_path, weights, client) for client in ("a", "c")]
    bad = []
    for client in ("b", "d"):
        change = small_round.random_tensors(layout, 3)
        change["b"][1] = HUGE
        bad.append(small_round.send(tmp_path, weights, client, change=change))
    result = aggregate([*good, *bad], weights, effort=effort)
    assert codes(result.rejected) == {"b.update": "overflow", "d.update": "overflow"}
    assert "tensor 'b': expected a change that leaves the weights finite" in result.rejected[0].reason
    assert written(tmp_path, result) == written(tmp_path, aggregate(good, weights, effort=effort))
    with pytest.raises(InvalidUpdateError, match="too large for float32"):
        aggregate([*good, *bad], weights, strict=True, effort=effort)


def test_nan_among_huge_values_is_the_fault_of_one(tmp_path: Path, weights: Weights, effort: Effort) -> None:
    huge = [
        small_round.send(tmp_path, weights, client, change=constant(weights, value))
        for client, value in (("a", 1e38), ("c", -1e38))
    ]
    bad = [forge_value(tmp_path, weights, client, np.nan) for client in ("b", "d", "e", "f")]
    result = aggregate([*huge, *bad], weights, effort=effort)
    assert [update.client for update in result.accepted] == ["a", "c"]
    assert set(codes(result.rejected).values()) == {"not_finite"}
    assert written(tmp_path, result) == written(tmp_path, aggregate(huge, weights, effort=effort))


def test_weights_that_are_not_finite_are_not_the_updates_fault(tmp_path: Path, weights: Weights) -> None:
    path = small_round.send(tmp_path, weights, "a")
    tensors = {**weights.tensors, "fc.x1": np.full((6, 2), np.nan, np.float32)}
    broken = Weights(weights.fingerprint, weights.round, weights.layout, tensors)
    broken.__dict__["base"] = weights.base
    with pytest.raises(WrongBundleError, match="weights: expected finite tensors"):
        aggregate([path], broken)


def test_bad_updates_cost_one_pass_more_and_not_one_each(tmp_path: Path, weights: Weights) -> None:
    paths = [small_round.send(tmp_path, weights, f"good-{number}") for number in range(5)]
    paths += [forge_value(tmp_path, weights, f"bad-{number}", np.inf) for number in range(5)]
    totals: list[int] = []
    effort = Effort(block_files=2)
    result = aggregate(paths, weights, on_progress=lambda _, total: totals.append(total), effort=effort)
    assert (len(result.accepted), len(result.rejected)) == (5, 5)
    assert totals == [10] * 5 + [5] * 3


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "changed"),
    "longer": (lengthen, "changed"),
    "replaced": (replace, "changed"),
    "gone": (Path.unlink, "unreadable"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path: Path, weights: Weights, kind: str) -> None:
    change, code = CHANGES[kind]
    good = [small_round.send(tmp_path, weights, client) for client in "abc"]
    bad = small_round.send(tmp_path, weights, "d")

    def after_first_block(done: int, total: int) -> None:
        if (done, total) == (2, 4):
            change(bad)

    effort = Effort(block_files=2)
    result = aggregate([bad, *good], weights, on_progress=after_first_block, effort=effort)
    assert codes(result.rejected) == {"d.update": code}
    assert written(tmp_path, result) == written(tmp_path, aggregate(good, weights, effort=effort))


@pytest.mark.parametrize("codec_name", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["truncated", "longer"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch, kind: str, codec_name: str
) -> None:
    monkeypatch.setattr(codec, "CHUNK_ENTRIES", 16)
    good = [small_round.send(tmp_path, weights, client, codec=codec_name) for client in "ac"]
    bad = small_round.send(tmp_path, weights, "b", codec=codec_name)
    read_into, reads = TensorFile.read_into, []

    def change_then_read(self: TensorFile, offset: int, out: Any) -> None:
        if self.path == bad:
            reads.append(offset)
            if len(reads) == 5:  # after its header and the first pieces
                CHANGES[kind][0](bad)
        read_into(self, offset, out)

    monkeypatch.setattr(TensorFile, "read_into", change_then_read)
    result = aggregate([bad, *good], weights, effort=Effort(threads=1))
    assert len(reads) >= 5
    assert codes(result.rejected) == {"b.update": "truncated" if kind == "truncated" else "changed"}
    assert written(tmp_path, result) == written(tmp_path, aggregate(good, weights))


def test_a_duplicate_that_vanishes_is_refused(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [small_round.send(tmp_path, weights, "a", name=name) for name in "12"]
    read = screening.read_change

    def vanish(*arguments: Any) -> Any:
        paths[1].unlink(missing_ok=True)
        return read(*arguments)

    monkeypatch.setattr(screening, "read_change", vanish)
    result = aggregate(paths, weights)
    assert codes(result.rejected) == {"2.update": "unreadable"}
    assert len(result.accepted) == 1


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


METRICS = {"learning_rate_sum": 0.25, "alpha": 0.1}
KEEPING: dict[str, ServerAlgorithm] = {
    "fedavgm": FedAvgM(),
    "fedadam": FedAdam(),
    "scaffold": ScaffoldServer(clients=30),
    "feddyn": FedDynServer(clients=30),
}


@pytest.mark.parametrize("name", KEEPING)
def test_order_and_bad_updates_change_no_byte_with_any_algorithm(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "CHUNK_ENTRIES", 16)
    weights = small_round.start_round(tmp_path, number=0)
    good = [
        small_round.send(tmp_path, weights, client, metrics={**METRICS, "learning_rate_sum": 0.5 + ord(client) / 100})
        for client in "abcde"
    ]
    bad = [forge_value(tmp_path, weights, "nan", np.nan), tmp_path / "missing"]
    bad += [small_round.send(tmp_path, weights, "late", round=5, metrics=METRICS)]
    results = []
    for paths in (good, good[::-1], [*bad, *good]):
        result = aggregate(paths, weights, algorithm=KEEPING[name])
        assert result.state is not None
        write_server_state(tmp_path / "state", result.state)
        results.append((written(tmp_path, result), (tmp_path / "state").read_bytes()))
        assert result.to_json()["algorithm"] == {"name": name, **KEEPING[name].options()}
    assert results[0] == results[1] == results[2]


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


TOO_LARGE: dict[str, tuple[ServerAlgorithm, float, float, dict[str, float]]] = {
    "control": (ScaffoldServer(clients=9), 0.0, 1e30, {"learning_rate_sum": 1e-20}),
    "second moment": (FedAdam(), 0.0, 1e30, {}),
    "sum of squares": (FedAdagrad(), 0.0, -1e20, {}),
    "weights": (FedAvgM(), 0.9 * HUGE, HUGE, {}),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_an_update_too_large_for_what_is_kept_is_refused(case: str, tmp_path: Path) -> None:
    algorithm, start, value, metrics = TOO_LARGE[case]
    layout = Layout((), (small_round.tensor("a", (300,)), small_round.tensor("b", (3,))))
    base = {"a": np.zeros(300, np.float32), "b": np.full(3, start, np.float32)}
    write_weights(tmp_path / "base", Weights("0", 0, layout, base))
    weights = read_weights(tmp_path / "base")
    good = [small_round.send(tmp_path, weights, client, metrics={**METRICS, **metrics}) for client in "ac"]
    change = {**small_round.random_tensors(layout, 3), "b": np.full(3, value, np.float32)}
    bad = small_round.send(tmp_path, weights, "b", change=change, metrics=metrics)
    result = aggregate([*good, bad], weights, algorithm=algorithm, bounds=UNBOUNDED)
    assert codes(result.rejected) == {"b.update": "overflow"}
    assert "tensor 'b': expected a change that leaves" in result.rejected[0].reason
    assert written(tmp_path, result) == written(tmp_path, aggregate(good, weights, algorithm=algorithm))


@pytest.mark.parametrize("rate_sum", [10**31, 5e-324, 0, -1.0], ids=str)
def test_a_sum_of_learning_rates_that_no_training_had_is_refused(rate_sum: float, tmp_path: Path) -> None:
    start = small_round.start_round(tmp_path, number=0)
    good = small_round.send(tmp_path, start, "a", metrics={"learning_rate_sum": 1})
    still = {name: np.zeros_like(tensor) for name, tensor in start.tensors.items()}
    bad = small_round.send(tmp_path, start, "b", change=still, metrics={"learning_rate_sum": rate_sum})
    result = aggregate([good, bad], start, algorithm=ScaffoldServer(clients=2))
    assert codes(result.rejected) == {"b.update": "wrong_algorithm"}
    largest = small_round.send(tmp_path, start, "c", change=still, metrics={"learning_rate_sum": 10**29})
    assert len(aggregate([good, largest], start, algorithm=ScaffoldServer(clients=2)).accepted) == 2


@pytest.mark.parametrize("algorithm", [FedAvgServer(lr=1e39), FedAdam(lr=1e39)], ids=["fedavg", "fedadam"])
def test_a_step_that_leaves_float32_is_nobodys_fault(algorithm: ServerAlgorithm, tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, number=0)
    path = small_round.send(tmp_path, weights, "a")
    message = f"expected finite weights after the step of algorithm {algorithm.name}, found one beyond float32; lower"
    with pytest.raises(FedparaError, match=message):
        aggregate([path], weights, algorithm=algorithm)


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
