"""Updates that are refused by name, and leave no trace in the mean of the others."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from means import METRICS, codes, forge_value, written

from fedpara_edge.aggregation import aggregate, screening
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.algorithms.adaptive import FedAdam
from fedpara_edge.algorithms.fedavgm import FedAvgM
from fedpara_edge.algorithms.feddyn import FedDynServer
from fedpara_edge.algorithms.scaffold import ScaffoldServer
from fedpara_edge.codecs import codec
from fedpara_edge.errors import FedparaError, InputError, InvalidUpdateError, TooFewUpdatesError, WrongBundleError
from fedpara_edge.formats.serverstate import write_server_state
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.tensorfile import TensorFile


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return small_round.start_round(tmp_path)


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
