"""The record of a server: one line for each round, evaluated in a process apart, which `report` and trackers read."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from served import Served, base_of, bundle_in, federation_in, record_in, serving, update_of, wait_until
from small_net import CLASSES, SHAPE, without_verification
from softmax_regression import make_bundle
from torch import nn

from device_runtime import open_data, open_engine
from device_runtime.evaluation import evaluate
from device_runtime.sources import Reading
from export import export_bundle
from fedpara_edge.aggregation import AggregateConfig
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.nn import Linear
from fedpara_edge.serving.evaluating import EvaluationSet, Evaluator, Scores
from fedpara_edge.serving.federation import Federation
from fedpara_edge.storage.rounds import round_path


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_in(tmp_path)


def lines(server: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (server / "metrics.jsonl").read_text().splitlines()]


def do_round(federation: Federation, folder: Path, *clients: str) -> None:
    """A round in which these clients' updates are taken."""
    number = federation.number
    base = read_weights(federation._folder.weights(number))
    for client in clients:
        federation.devices.join(client, f"proof of {client}", now=0)
        assert federation.task(client).train
        federation.take(update_of(folder, base, client), client)
    federation.close()
    federation.advance()
    assert federation.number == number + 1


class Scoring:
    """What evaluates weights: the round as accuracy; for some rounds, an error."""

    def __init__(self, *, failing: tuple[int, ...] = ()) -> None:
        self._failing, self.seen = failing, list[int]()

    def __call__(self, weights: Path) -> Scores:
        number = read_weights(weights).round
        self.seen.append(number)
        if number in self._failing:
            raise FedparaError("test: expected it to be there, found it gone")
        return Scores(accuracy=number / 10, loss=1 / number, examples=7)

    def stop(self) -> None:
        pass


def test_each_round_has_one_line_however_often_the_server_starts(tmp_path: Path, bundle: Bundle) -> None:
    server, scoring = tmp_path / "server", Scoring()
    for start in range(3):
        with federation_in(server, bundle, updates=1) as federation:
            if start < 2:
                do_round(federation, tmp_path / "sent", "ann")
            if start:
                record = record_in(federation, evaluate=scoring)
                record.catch_up(federation.number, 1)
                record.catch_up(federation.number, 1)
    found = lines(server)
    assert [(line["event"], line.get("round")) for line in found] == [("arm", None), ("round", 1), ("round", 2)]
    assert [line["accuracy"] for line in found[1:]] == [0.1, 0.2]
    assert scoring.seen == [1, 2]


def test_a_line_tells_what_came_of_its_round(tmp_path: Path, bundle: Bundle) -> None:
    server, sent = tmp_path / "server", tmp_path / "sent"
    with federation_in(server, bundle, updates=1, clock=lambda: time.time()) as federation:
        for client in ("ben", "cat"):
            federation.devices.join(client, "proof", now=0)
            assert federation.task(client).train
        (tmp_path / "garbage").write_bytes(b"garbage")
        with pytest.raises(FedparaError, match=r"update of 'ben'"):
            federation.take(tmp_path / "garbage", "ben")
        federation.note_sent(1000)
    with federation_in(server, bundle, updates=1, clock=lambda: time.time()) as federation:
        assert [device.error for device in federation.devices.all if device.client == "ben"] != [None]
        federation.note_sent(234)
        do_round(federation, sent, "ann")
        record_in(federation).catch_up(1, 3)
        size = update_of(sent, base_of(bundle), "ann").stat().st_size
    about, line = lines(server)
    assert (about["model"], about["clients"], about["rounds"]) == ("softmax regression", 3, None)
    assert (about["algorithm"], about["codec"], about["kind"]) == ("fedavg", "float32", "dense")
    expected = {
        "participants": 3, "updates": 1, "rejected": 1, "rejections": {"truncated": 1}, "stragglers": 1,
        "up_bytes": size + len(b"garbage"), "down_bytes": 1234, "train_loss": 0.5, "accuracy": None, "examples": 10,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["seconds"] < 60
    assert line["weight_norm"] > 0


def test_what_can_not_be_evaluated_is_told_and_recorded_without(tmp_path: Path, bundle: Bundle) -> None:
    events: list[tuple[str, Any]] = []
    with federation_in(tmp_path / "server", bundle, updates=1) as federation:
        record = record_in(federation, evaluate=Scoring(failing=(1,)), rounds=2, events=events)
        for number in (1, 2):
            do_round(federation, tmp_path / "sent", "ann")
            record.catch_up(number, 1)
        assert [line["accuracy"] for line in record.rounds] == [None, 0.2]
        assert next(fields["message"] for name, fields in events if name == "error").startswith("round 1: test:")
        assert lines(tmp_path / "server")[-1]["event"] == "done"
        record_in(federation, rounds=5).catch_up(2, 1)
    assert lines(tmp_path / "server")[-1]["event"] == "round", "with more rounds it is not done"


def test_report_shows_the_rounds_of_a_server(tmp_path: Path, bundle: Bundle, run: Command) -> None:
    server = tmp_path / "server"
    with federation_in(server, bundle, updates=1) as federation:
        for _ in range(3):
            do_round(federation, tmp_path / "sent", "ann", "ben")
        record_in(federation, evaluate=Scoring()).catch_up(3, 2)
    ended = run("report", server)
    assert ended.code == 0, ended.err
    page = (server / "report.html").read_text()
    for shown in ("softmax regression", "3 rounds · 2 clients", "30.0 %", "accuracy-by-round"):
        assert shown in page or (server / f"{shown}.png").exists(), shown
    assert "rounds done" not in ended.err
    table = run("report", server, "--csv", "-").out.splitlines()
    assert len(table) == 4
    assert "rejections" not in table[0] or "stragglers" in table[0]
    assert run("report", tmp_path / "sent").err.startswith(f"Error: {tmp_path / 'sent'}: expected a run folder with")
    with federation_in(server, bundle, updates=1):
        pass  # a report in the folder does no harm to the server


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that an engine runs, all of which is shared."""
    options = ExportConfig(name="small", input_shape=SHAPE, input_dtype="float32", engines=("onnxruntime",))
    model = nn.Sequential(nn.Flatten(), Linear(64, CLASSES, rank=2))
    with without_verification():
        return export_bundle(model, tmp_path_factory.mktemp("trainable") / "bundle", options)[0]


def test_weights_are_evaluated_in_a_process_apart(
    tmp_path: Path, trainable: Bundle, write_examples: Callable[[Path], Path]
) -> None:
    bundle = trainable
    test = EvaluationSet(data=write_examples(tmp_path / "test.npz"), reading=Reading(), threads=1)
    aggregate = AggregateConfig(downlink_codec="int8")
    with serving(tmp_path / "server", bundle, aggregate=aggregate, updates=1, rounds=1, test=test) as served:
        member = served.member(tmp_path / "ann", "ann")
        assert member.task(wait=False).train
        update = update_of(tmp_path / "sent", base_of(bundle), "ann")
        served.running.federation.take(update, "ann")
        served.running.federation.close()
        served.wait_for_round(1)
        _wait_for_line(served, tmp_path / "server")
    expected = evaluate(
        open_engine(bundle, threads=1), open_data(test.data, bundle.manifest),
        weights=round_path(tmp_path / "server" / "weights", 1),
    )  # fmt: skip
    line = lines(tmp_path / "server")[1]
    assert (line["accuracy"], line["loss"]) == (expected.accuracy, pytest.approx(expected.loss, rel=1e-6))


def _wait_for_line(served: Served, server: Path) -> None:
    metrics = server / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(lines(server)) >= 3, served.events)


@pytest.fixture
def write_examples() -> Callable[[Path], Path]:
    """Write examples that fit the small net."""

    def write(path: Path) -> Path:
        random = np.random.default_rng(1)
        np.savez(path, x=random.standard_normal((9, *SHAPE), np.float32), y=random.integers(0, CLASSES, 9))
        return path

    return write


def test_an_evaluator_that_was_lost_is_started_again(
    tmp_path: Path, trainable: Bundle, write_examples: Callable[[Path], Path]
) -> None:
    bundle = trainable
    weights = bundle.file("weights.safetensors")
    evaluator = Evaluator(bundle, EvaluationSet(data=write_examples(tmp_path / "x.npz"), reading=Reading(), threads=1))
    try:
        first = evaluator(weights)
        assert first.examples == 9
        evaluator._process.kill()
        evaluator._process.join()
        assert evaluator(weights) == first
        with pytest.raises(FedparaError, match="expected"):
            evaluator(tmp_path / "nothing")
    finally:
        evaluator.stop()
    with pytest.raises(FedparaError, match="found that it ended"):
        evaluator(weights)


def test_test_data_that_does_not_fit_is_refused_before_the_server_runs(
    tmp_path: Path, trainable: Bundle, run: Command
) -> None:
    for options, text in (
        (("--test", tmp_path / "none.npz"), "none.npz"),
        (("--image-size", "8,8"), "--image-size: expected with --test, found without"),
    ):
        ended = run("serve", trainable.path, "--state", tmp_path / "server", "--port", "0", *options)
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
        assert text in ended.err


def test_a_model_with_personal_tensors_is_not_evaluated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="each device has a model of its own"):
        Evaluator(make_bundle(tmp_path / "own"), EvaluationSet(data=tmp_path, reading=Reading()))
