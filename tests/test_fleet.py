"""A fleet without Flower's processes: what travels, and what the server makes of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import Command, succeed
from fleet_grid import EXPORT, Grid, crashed, garbage, gone, of_another_app, replays, silent, trains
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from tiny_plan import write_plan

from device_runtime.config import TrainCall
from device_runtime.data import open_data
from device_runtime.engines.registry import open_engine
from device_runtime.training import train
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.errors import InputError, TooFewUpdatesError, WrongBundleError
from fedpara_edge.fleet import exchange, gathering, replaced
from fedpara_edge.fleet.bells import Bell, Bells, Place
from fedpara_edge.fleet.device import answer
from fedpara_edge.fleet.messages import SMALL_BYTES, Answer, Call, read_answer, read_call
from fedpara_edge.fleet.rounds import run_fleet
from fedpara_edge.fleet.settings import FleetConfig, NodeConfig
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.report import read_metrics
from fedpara_edge.trust.keys import new_key

ROUNDS, DEVICES = 2, (11, 22, 33)
Fleet = Callable[..., FleetConfig]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    succeed(place, EXPORT.split())
    return place / "bundle"


@pytest.fixture
def fleet(tmp_path: Path, bundle: Path) -> Fleet:
    """Settings for a plan of one arm, with changes of its text."""

    def make(*changes: tuple[str, str], **settings: Any) -> FleetConfig:
        plan = write_plan(tmp_path, ("participants = 2\n", ""), *changes)
        for number in DEVICES:
            data = np.load(tmp_path / "data.npz")
            rows = slice(3 * number, 3 * number + 20 + number % 10)
            np.savez(tmp_path / f"{number}.npz", x=data["x"][rows, None], y=data["y"][rows])
        values = {"nodes": 3, "wait_seconds": 1.0, **settings}
        return FleetConfig(bundle=bundle, plan=plan, run=tmp_path / "run", arm="small", **values)

    return make


@pytest.fixture(autouse=True)
def _in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(gathering, "WAIT_SECONDS", 0.01)


def devices(place: Path, *numbers: int) -> dict[int, Any]:
    return {number: device(place, number) for number in numbers or DEVICES}


def device(place: Path, number: int, **more: Any) -> Any:
    return trains(place / f"state-{number}", place / f"{number}.npz", **{"client": f"client-{number}", **more})


def rounds_of(config: FleetConfig) -> list[dict[str, Any]]:
    lines = map(json.loads, (config.run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "round"]


def weights_of(config: FleetConfig, number: int = ROUNDS) -> Path:
    return config.run / "work" / "small" / "seed-4" / "weights" / f"round-{number}.safetensors"


def by_hand(place: Path, config: FleetConfig, options: dict[str, Any], server: AggregateConfig) -> bytes:
    """The weights after the rounds of a plan, by `train` and `run_round` alone."""
    bundle = open_bundle(config.bundle)
    weights = bundle.file("weights.safetensors")
    call = TrainCall(**{"batch_size": 8, "lr": 0.1, "lr_decay": 0.9, "codec": "int8", "seed": 4, **options})
    (place / "hand").mkdir()
    for number in range(1, ROUNDS + 1):
        updates = []
        for name in DEVICES:
            updates.append(place / "hand" / f"{number}-{name}.safetensors")
            train(
                open_engine(bundle, "onnxruntime", threads=1),
                open_data(place / f"{name}.npz", bundle.manifest),
                weights,
                call,
                output=updates[-1],
                encoder=call.encoder,
                state=place / "hand" / f"state-{name}",
                client=f"client-{name}",
                server_state=place / "hand" / "server" / f"round-{number - 1}.safetensors"
                if call.algorithm == "scaffold" and number > 1
                else None,
            )
        after = place / "hand" / f"weights-{number}.safetensors"
        state = place / "hand" / "server"
        keeps = server.downlink_codec or server.server_algorithm.groups
        run_round(
            updates,
            weights,
            after,
            server,
            state=state if keeps else None,
            change=place / "hand" / f"change-{number}.safetensors" if server.downlink_codec else None,
        )
        weights = after
    return weights.read_bytes()


VARIANTS: dict[str, tuple[Sequence[tuple[str, str]], dict[str, Any], dict[str, Any]]] = {
    "int8": ((), {}, {}),
    "changes": (
        (("[arms.dense]", "[aggregate]\ndowlink\n[arms.dense]".replace("dowlink", 'downlink_codec = "int8"')),),
        {},
        {"downlink_codec": "int8"},
    ),
    "scaffold": (
        (
            ("[arms.dense]", '[aggregate]\nalgorithm = "scaffold"\n[arms.dense]'),
            ("lr_decay = 0.9", 'lr_decay = 0.9\nalgorithm = "scaffold"'),
            ("local_only = true", 'local_only = true\ntrain.algorithm = "fedavg"\naggregate.algorithm = "fedavg"'),
        ),
        {"algorithm": "scaffold"},
        {"algorithm": "scaffold", "clients": 3},
    ),
    "robust": ((("[arms.dense]", '[aggregate]\nrule = "median"\n[arms.dense]'),), {}, {"rule": "median"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fleet_comes_to_the_weights_of_train_and_aggregate_by_hand(
    tmp_path: Path, fleet: Fleet, variant: str
) -> None:
    changes, options, server = VARIANTS[variant]
    config = fleet(*changes)
    run_fleet(Grid(devices(tmp_path)), config)
    assert weights_of(config).read_bytes() == by_hand(tmp_path, config, options, AggregateConfig(**server))
    assert [(line["round"], line["participants"], line["rejected"]) for line in rounds_of(config)] == [
        (1, 3, 0),
        (2, 3, 0),
    ]


def test_what_a_device_has_is_not_sent_again(tmp_path: Path, fleet: Fleet) -> None:
    config = fleet(VARIANTS["changes"][0][0])
    grid = Grid(devices(tmp_path, 11))
    run_fleet(grid, replace(config, nodes=1))
    first, second = (set(call.files) for _, call in grid.calls)
    assert {"bundle/manifest.json", "bundle/weights.safetensors"} < first
    assert "weights" not in first
    assert second == {"change-1"}


def test_a_device_that_lost_what_it_had_gets_it_again(tmp_path: Path, fleet: Fleet) -> None:
    config = replace(fleet(VARIANTS["changes"][0][0]), nodes=1)
    forgets = device(tmp_path, 11)

    def forgetful(call: Call) -> Any:
        if call.round and set(call.files) == {"change-1"}:
            for path in sorted((tmp_path / "state-11" / "fleet").rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
        return forgets(call)

    grid = Grid({11: forgetful})
    run_fleet(grid, config)
    assert len(grid.calls) == 3
    assert {"bundle/manifest.json", "change-1"} < set(grid.calls[2][1].files)
    assert [line["rejected"] for line in rounds_of(config)] == [0, 0]


@pytest.mark.parametrize("size", [1000, SMALL_BYTES + 1])
def test_an_update_travels_as_its_bytes_and_little_else(size: int) -> None:
    update = np.random.default_rng(0).bytes(size)
    content = Answer(numbers={"examples": 7, "loss": 0.5}, files={"update": update}).content()
    assert read_answer(content).files == {"update": update}
    message = Message(content, dst_node_id=1, message_type="train")
    parts = get_all_nested_objects(message)
    assert len(parts) == (3 if size <= SMALL_BYTES else 6)  # each of which is a request, in every hop
    sent_bytes = sum(len(part.deflate()) for part in parts.values())
    assert size < sent_bytes < size + 3000


def test_a_call_reads_as_it_was_written() -> None:
    call = Call(fingerprint="f", round=3, base="b", options={"lr": 0.1}, run="winter", files={"weights": b"w"})
    assert read_call(call.content()) == call


def test_neither_calls_nor_answers_pile_up(tmp_path: Path, fleet: Fleet) -> None:
    config = fleet(("rounds = 2", "rounds = 1"), at_once=20, nodes=30)
    reply = device(tmp_path, 11)

    def say(call: Call) -> Any:
        return reply(replace(call, options={**call.options, "epochs": 1}))

    grid = Grid(dict.fromkeys(range(1, 31), say))
    run_fleet(grid, config)
    assert grid.most_open == 20
    assert grid.most_held <= exchange.HELD
    (line,) = rounds_of(config)
    assert line["rejections"] == {"duplicate": 29}


FAULTS: dict[str, tuple[Any, str]] = {
    "dies": (gone, "node_unavailable"),
    "fails": (crashed, "client_app_failed"),
    "hangs": (silent, "late"),
    "garbage": (garbage, "not_safetensors"),
    "another app": (of_another_app, "invalid"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_device_with_a_fault_costs_its_own_update_alone(tmp_path: Path, fleet: Fleet, fault: str) -> None:
    faulty, code = FAULTS[fault]
    config = fleet(round_seconds=1.0)
    said: list[str] = []
    run_fleet(Grid({**devices(tmp_path, 11, 22), 44: faulty}), config, said.append)
    first = rounds_of(config)[0]
    assert first["rejections"] == {code: 1}
    assert len(rounds_of(config)) == ROUNDS
    assert f"[{code}]" in said[0]
    alone = replace(config, run=tmp_path / "alone", nodes=2)
    for number in (11, 22):
        (tmp_path / f"state-{number}").rename(tmp_path / f"before-{number}")
    run_fleet(Grid(devices(tmp_path, 11, 22)), alone)
    assert weights_of(config).read_bytes() == weights_of(alone).read_bytes()


def test_an_update_of_an_old_round_does_not_count_again(tmp_path: Path, fleet: Fleet) -> None:
    config = fleet()
    run_fleet(Grid({**devices(tmp_path, 11, 22), 33: replays(device(tmp_path, 33))}), config)
    assert [line["rejections"] for line in rounds_of(config)] == [{}, {"wrong_round": 1}]


def test_another_device_takes_the_place_of_one_that_went_away(tmp_path: Path, fleet: Fleet) -> None:
    config = fleet(nodes=2)
    grid = Grid(devices(tmp_path, 11))

    def dies(call: Call) -> Any:
        grid.devices[33] = device(tmp_path, 33)
        return gone(call)

    grid.devices[22] = dies
    run_fleet(grid, config)
    assert [node for node, _ in grid.calls[:3]] == [11, 22, 33]
    assert rounds_of(config)[0]["rejections"] == {"node_unavailable": 1}
    assert rounds_of(config)[0]["participants"] == 3


def test_a_late_answer_is_no_answer_to_the_next_call_and_then_the_device_is_back(tmp_path: Path, fleet: Fleet) -> None:
    config = fleet(("rounds = 2", "rounds = 3"), nodes=2, round_seconds=0.5)
    prompt, slow = device(tmp_path, 11), device(tmp_path, 22)
    finished = [False]

    def hangs_once(call: Call) -> Any:
        return slow(call) if finished[0] or call.round else None

    def say(call: Call) -> Any:
        finished[0] = call.round >= 1
        return prompt(call)

    grid = Grid({11: say, 22: hangs_once})
    run_fleet(grid, config)
    assert [node for node, _ in grid.calls] == [11, 22, 11, 11, 22]
    assert [line["rejections"] for line in rounds_of(config)] == [{"late": 1}, {"wrong_round": 1}, {}]


def test_a_killed_server_asks_only_for_what_is_missing_and_nothing_counts_twice(tmp_path: Path, fleet: Fleet) -> None:
    whole = fleet()
    run_fleet(Grid(devices(tmp_path)), whole)
    for number in DEVICES:
        (tmp_path / f"state-{number}").rename(tmp_path / f"before-{number}")
    config = replace(whole, run=tmp_path / "killed")

    def kills(call: Call) -> Any:
        if call.round == 1:
            raise KeyboardInterrupt
        return device(tmp_path, 33)(call)

    with pytest.raises(KeyboardInterrupt):
        run_fleet(Grid({**devices(tmp_path, 11, 22), 33: kills}), replace(config, at_once=1))
    assert len(rounds_of(config)) == 1
    grid = Grid(devices(tmp_path))
    run_fleet(grid, config)
    assert [(node, call.round) for node, call in grid.calls] == [(33, 1)]
    assert [line["round"] for line in rounds_of(config)] == [1, 2]
    assert weights_of(config).read_bytes() == weights_of(whole).read_bytes()


def test_a_fleet_goes_on_when_its_plan_has_more_rounds_and_is_reported_on(
    tmp_path: Path, fleet: Fleet, run: Command
) -> None:
    config = fleet(test=None)
    run_fleet(Grid(devices(tmp_path)), config)
    run_fleet(Grid({}), config)
    fleet(("rounds = 2", "rounds = 3"))
    run_fleet(Grid(devices(tmp_path)), config)
    assert [line["round"] for line in rounds_of(config)] == [1, 2, 3]
    assert read_metrics(config.run)
    assert run("report", config.run).code == 0


def test_a_device_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path, fleet: Fleet) -> None:
    config = fleet()
    bundle = open_bundle(config.bundle)
    call = TrainCall(batch_size=8, lr=0.1, lr_decay=0.9, codec="int8", seed=4, engine="onnxruntime", epochs=1)
    (tmp_path / "sent").mkdir()

    def stop(step: int, *_: Any) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(
            open_engine(bundle, "onnxruntime", threads=1),
            open_data(tmp_path / "11.npz", bundle.manifest),
            bundle.file("weights.safetensors"),
            call,
            output=tmp_path / "sent" / "update.safetensors",
            encoder=call.encoder,
            state=tmp_path / "state-11",
            on_step=stop,
        )
    node = NodeConfig(data=tmp_path / "11.npz", state=tmp_path / "state-11", bundle=config.bundle)
    options = {name: getattr(call, name) for name in ("batch_size", "lr", "lr_decay", "codec", "seed", "engine")}
    base = read_weights(bundle.file("weights.safetensors")).base
    found = answer(Call(fingerprint=bundle.manifest.fingerprint, round=0, base=base, options=options), node)
    assert found.code == ""
    assert found.numbers["resumed_from_step"] == 1


def test_signed_updates_of_known_clients_alone_count(tmp_path: Path, fleet: Fleet) -> None:
    listed = []
    for number in (11, 22):
        public = new_key(tmp_path / f"key-{number}")
        listed.append(f'[clients.client-{number}]\nkey = "{public}"')
    (tmp_path / "clients.toml").write_text('run = "winter"\n' + "\n".join(listed))
    config = fleet(allow=tmp_path / "clients.toml")
    signing = {number: device(tmp_path, number, key=tmp_path / f"key-{number}") for number in (11, 22)}
    said: list[str] = []
    run_fleet(Grid({**signing, 33: device(tmp_path, 33)}), config, said.append)
    assert [line["rejections"] for line in rounds_of(config)] == [{"unsigned": 1}, {"unsigned": 1}]


def test_a_device_with_another_bundle_refuses_in_a_line(tmp_path: Path, fleet: Fleet) -> None:
    succeed(tmp_path, [*EXPORT.replace("0.5", "0.3").split()[:-1], "other"])
    config = fleet(nodes=2)
    said: list[str] = []
    run_fleet(
        Grid({11: device(tmp_path, 11), 22: device(tmp_path, 22, bundle=tmp_path / "other")}), config, said.append
    )
    assert [line["rejections"] for line in rounds_of(config)] == [{"wrong_bundle": 1}] * 2
    assert "expected the bundle of the fleet" in said[0]
    assert "\n" not in said[0]


def test_too_few_devices_are_a_line_and_the_round_is_not_done(tmp_path: Path, fleet: Fleet) -> None:
    config = fleet(wait_seconds=0.1)
    with pytest.raises(TooFewUpdatesError, match="expected at least 3 devices"):
        run_fleet(Grid(devices(tmp_path, 11)), config)
    with pytest.raises(TooFewUpdatesError):
        run_fleet(Grid(dict.fromkeys(DEVICES, crashed)), config)
    assert rounds_of(config) == []


def test_a_bundle_that_is_not_what_was_called_for_is_refused(tmp_path: Path, fleet: Fleet) -> None:
    config = fleet()
    files = {f"bundle/{path.name}": path.read_bytes() for path in config.bundle.iterdir()}
    node = NodeConfig(data=tmp_path / "11.npz", state=tmp_path / "state")
    call = Call(fingerprint="0" * 64, round=0, base="", options={}, files=files)
    assert answer(call, node).code == WrongBundleError.code
    assert not (tmp_path / "state" / "fleet" / "bundle").exists()
    hostile = replace(call, files={"bundle/../../out": b"x"})
    assert answer(hostile, node).code == InputError.code
    assert not (tmp_path / "state" / "out").exists()


def test_a_bell_wakes_who_waits_also_of_rings_before_and_once() -> None:
    bell = Bell()
    assert not rings(bell)
    for _ in range(100_000):  # more than a pipe holds
        bell.ring()
    assert rings(bell)
    while rings(bell):
        pass
    child = os.fork()
    if not child:
        bell.ring()
        os._exit(0)
    os.waitpid(child, 0)
    assert rings(bell)
    assert not rings(bell)


def test_a_node_is_rung_when_it_is_called_and_the_server_when_it_answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fleet: Fleet
) -> None:
    from flwr.supernode import start_client_internal

    bells = Bells(2, others=False)
    for name in ("_pull_and_store_message", "_push_messages", "time"):
        monkeypatch.setattr(start_client_internal, name, getattr(start_client_internal, name))  # as it is, afterwards
    messages: list[int | None] = [None, 5]
    start_client_internal._pull_and_store_message = lambda **_: messages.pop(0)  # type: ignore[assignment]
    start_client_internal._push_messages = lambda **_: None  # type: ignore[assignment]
    replaced.ring_in_supernode(Place(bells, 1, is_told=True))
    state = SimpleNamespace(get_node_id=lambda: 2**64 - 11)
    for rung in (False, True):
        start_client_internal._pull_and_store_message(state=state)  # type: ignore[call-arg]
        assert rings(bells.tasks[1]) is rung
    assert not rings(bells.server)
    start_client_internal._push_messages()  # type: ignore[call-arg]
    assert rings(bells.server)

    monkeypatch.setattr("fedpara_edge.fleet.bells._here", [bells])
    run_fleet(Grid({2**64 - 11: device(tmp_path, 11)}), fleet(nodes=1))
    assert rings(bells.nodes[1])
    assert not rings(bells.nodes[0])
    started = time.monotonic()
    bells.nodes[1].ring()
    start_client_internal.time.sleep(30)  # Flower's word for waiting
    assert time.monotonic() - started < 10


def rings(bell: Bell) -> bool:
    """Whether a bell has rung since the last wait for it."""
    started = time.monotonic()
    bell.wait(0.2)
    return time.monotonic() - started < 0.2
