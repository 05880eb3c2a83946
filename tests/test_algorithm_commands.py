"""Federated optimizers from the command line: rounds of train, aggregate and evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from small_federation import EXAMPLES, write_data
from small_net import SmallBundle

from fedpara_edge.aggregation import aggregate
from fedpara_edge.algorithms import find_server
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.serverstate import read_server_state, write_server_state
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.storage.rounds import round_path


class Typing:
    """A person who runs a federation from the command line."""

    def __init__(self, run: Command, bundle: Bundle, folder: Path) -> None:
        self.run, self.bundle, self.folder = run, bundle, folder
        for client in range(3):
            write_data(folder / f"{client}.npz", client)

    def weights(self, round: int) -> Path:
        return self.folder / f"round-{round}.safetensors" if round else self.bundle.file(WEIGHTS)

    def train(self, client: int, round: int, *options: object) -> Any:
        return self.run(
            *("train", self.bundle.path, "--data", self.folder / f"{client}.npz", "--weights", self.weights(round)),
            *("--state", self.folder / f"state-{client}", "--engine", "onnxruntime", "--threads", 1, "--lr", 0.1),
            *("-o", self.folder / f"{round}-{client}.update", "--client", f"c{client}", *options, "--json"),
        )

    def aggregate(self, round: int, *options: object, config: object = None) -> Any:
        return self.run(
            *(() if config is None else ("--config", config)),
            *("aggregate", *sorted(self.folder.glob(f"{round}-*.update")), "--weights", self.weights(round)),
            *("-o", self.weights(round + 1), *options, "--json"),
        )


COMMANDS: dict[str, tuple[Callable[[Path, int], tuple[object, ...]], tuple[object, ...]]] = {
    "fedprox": (lambda *_: ("--algorithm", "fedprox:mu=0.3"), ("--algorithm", "fedavg:lr=0.9")),
    "scaffold": (
        lambda folder, round: (
            *("--algorithm", "scaffold"),
            *(("--server-state", folder / "server" / f"round-{round}.safetensors") if round else ()),
        ),
        ("--algorithm", "scaffold", "--clients", 3, "--state", "server", "--weighting", "examples"),
    ),
    "feddyn": (
        lambda *_: ("--algorithm", "feddyn:alpha=0.3"),
        ("--algorithm", "feddyn:alpha=0.3", "--clients", 3, "--state", "server"),
    ),
    "fedyogi": (lambda *_: (), ("--algorithm", "fedyogi:tau=0.01,beta1=0.5", "--state", "server")),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_federation_from_the_command_line(
    name: str, run: Command, small_bundle: SmallBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    person = Typing(run, small_bundle(), tmp_path)
    of_device, of_server = COMMANDS[name]
    for round in range(2):
        for client in range(2):
            assert person.train(client, round, *of_device(tmp_path, round)).code == 0
        ended = person.aggregate(round, *of_server)
        assert ended.code == 0, ended.err
        assert ended.json["round"] == round + 1
    told = ended.json["algorithm"]
    assert told["name"] == ("fedavg" if name == "fedprox" else name)
    assert ended.json["weighting"] == ("equal" if name == "feddyn" else "examples")
    if told["name"] != "fedavg":
        assert sorted(path.name for path in (tmp_path / "server").glob("*.safetensors")) == [
            "round-1.safetensors",
            "round-2.safetensors",
        ]
        assert read_server_state(Path("server/round-2.safetensors")).base == read_weights(person.weights(2)).base
        assert run("inspect", "server/round-2.safetensors", "--json").json["algorithm"]["name"] == name


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam"])
def test_a_lossy_downlink_sends_what_it_left_out(
    algorithm: str, run: Command, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    person, server = Typing(run, small_bundle(), tmp_path), tmp_path / "server"
    codecs = ("int4", "int4", "float32")
    for round, codec in enumerate(codecs):
        assert person.train(0, round).code == 0
        base, updates = read_weights(person.weights(round)), [tmp_path / f"{round}-0.update"]
        state = read_server_state(round_path(server, round)) if round else None
        change, options = tmp_path / f"{round}.change", ("--algorithm", algorithm, "--state", server)
        if state is not None:
            ended = person.aggregate(round, *options)
            assert (ended.code, "--downlink-codec: expected one as in the round before" in ended.err) == (2, True)
        ended = person.aggregate(round, *options, "--downlink-codec", codec, "--change", change)
        assert ended.code == 0, ended.err
        assert ended.json["change_bytes"] == change.stat().st_size
        published = read_weights(person.weights(round + 1))
        write_weights(tmp_path / "applied", apply_change(base, change))
        assert (tmp_path / "applied").read_bytes() == person.weights(round + 1).read_bytes()
        kept = read_server_state(round_path(server, round + 1))
        kept.check_weights(published)
        meant = aggregate(updates, base, algorithm=find_server(algorithm), state=state).weights.tensors
        residual = kept.groups.get("residual")
        assert (residual is None) == (codec == "float32")
        for name, tensor in meant.items():
            left_before = state.groups["residual"][name] if state is not None else 0.0
            left = residual[name] if residual is not None else 0.0
            np.testing.assert_allclose(published.tensors[name] + left, tensor + left_before, atol=1e-6)
    assert person.train(0, 3).code == 0
    assert person.aggregate(3, "--algorithm", algorithm, "--state", server).code == 0


def test_clients_are_evaluated_one_by_one_and_together(run: Command, small_bundle: SmallBundle, tmp_path: Path) -> None:
    person = Typing(run, small_bundle(), tmp_path)
    for client in range(3):
        assert person.train(client, 0).code == 0
    assert person.aggregate(0).code == 0
    command = ("evaluate", small_bundle().path, "--weights", person.weights(1), "--engine", "onnxruntime", "--json")
    each = [("--data", tmp_path / f"{client}.npz", "--state", tmp_path / f"state-{client}") for client in range(3)]
    alone = [run(*command, *options).json for options in each]
    found = run(*command, *(option for options in each for option in options)).json
    for one, client in zip(alone, found["clients"], strict=True):
        assert {key: client[key] for key in one.keys() - {"labels"}} == {
            key: one[key] for key in one.keys() - {"labels"}
        }
        assert one["labels"]["y"]["accuracy"] == client["accuracy"]
    accuracies = [one["accuracy"] for one in alone]
    right = sum(one["accuracy"] * one["examples"] for one in alone)
    assert found["accuracy"] == pytest.approx(right / sum(EXAMPLES))
    assert found["distribution"]["of"] == "accuracy"
    assert found["distribution"]["mean"] == pytest.approx(np.mean(accuracies))
    assert found["distribution"]["quartiles"][::4] == [min(accuracies), max(accuracies)]
    text = run(*command[:-1], *(option for options in each for option in options)).out
    assert f"accuracy of 3 clients: mean {np.mean(accuracies):.4f}, " in text
    ended = run(*command, *each[0], *each[1][:2])
    assert (ended.code, "expected a state folder for each of the 2 datasets, or none at all, found 1" in ended.err) == (
        2,
        True,
    )


def test_options_of_the_algorithm_come_from_the_config_as_well(
    run: Command, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    person = Typing(run, small_bundle(), tmp_path)
    config = tmp_path / "config.toml"
    config.write_text('[aggregate]\nalgorithm = "fedavgm:momentum=0.5,lr=0.25"\n')
    assert person.train(0, 0).code == 0
    ended = person.aggregate(0, "--state", tmp_path / "server", config=config)
    assert ended.json["algorithm"] == {"name": "fedavgm", "momentum": 0.5, "lr": 0.25}
    assert ended.json["state"] == str(tmp_path / "server" / "round-1.safetensors")


def test_commands_that_do_not_fit_say_so(run: Command, small_bundle: SmallBundle, tmp_path: Path) -> None:
    person = Typing(run, small_bundle(), tmp_path)
    server = tmp_path / "server"
    for options, code, message in (
        (("--algorithm", "fedavg:mu=0.1"), 2, "algorithm: fedavg: mu: expected an option of it, found an unknown one"),
        (("--algorithm", "fedsgd"), 2, "algorithm: expected one of fedavg, fedprox, scaffold, feddyn"),
        (("--server-state", server), 2, "expected a control variate with algorithm scaffold, found fedavg"),
        (("--algorithm", "scaffold", "--server-state", server), 2, "expected a readable file"),
    ):
        ended = person.train(0, 0, *options)
        assert (ended.code, message in ended.err) == (code, True), ended.err
    assert person.train(0, 0).code == 0
    for options, message in (
        (("--algorithm", "fedavg:momentum=1"), "momentum: expected an option of it, found an unknown one; it has lr"),
        (("--algorithm", "fedadam"), "state: expected a folder for what algorithm fedadam keeps, found none"),
        (
            ("--algorithm", "scaffold", "--state", server),
            "scaffold: clients: expected an integer of at least 1, found none",
        ),
        (("--downlink-codec", "float32"), "--change: expected a file for the published change, found none"),
        (("--change", server), f"--downlink-codec: expected a codec for the change {server}, found none"),
    ):
        ended = person.aggregate(0, *options)
        assert (ended.code, message in ended.err) == (2, True), ended.err
        assert not person.weights(1).exists()
    adam = ("--algorithm", "fedadam", "--state", server)
    assert person.aggregate(0, *adam).code == 0
    files = person.weights(1), server / "round-1.safetensors"
    written = [path.read_bytes() for path in files]
    other = ("--algorithm", "fedadam:lr=0.5", "--state", server)
    for gone in ((), files[:1]):  # none, and then, as a power cut between the two leaves it, the weights
        for path in gone:
            path.unlink()
        ended = person.aggregate(0, *other)
        assert (ended.code, f"{files[1]}: expected a new output, found an existing one" in ended.err) == (7, True)
        assert person.aggregate(0, *adam).code == 0
        assert [path.read_bytes() for path in files] == written
    assert person.train(0, 1).code == 0
    for options, code, message in (
        (("--algorithm", "fedyogi", "--state", server), 2, "algorithm: expected fedadam as in round 1, found fedyogi"),
        (
            ("--algorithm", "fedadam", "--state", tmp_path / "empty"),
            2,
            "algorithm fedadam: expected the server state of round 1, found none",
        ),
        (("--state", server), 2, "algorithm: expected fedadam as in round 1, found fedavg"),
    ):
        ended = person.aggregate(1, *options)
        assert (ended.code, message in ended.err) == (code, True), ended.err
    write_server_state(
        server / "round-1.safetensors", replace(read_server_state(server / "round-1.safetensors"), round=2)
    )
    ended = person.aggregate(1, "--algorithm", "fedadam", "--state", server)
    assert ended.code == 6
    assert "round-1.safetensors: server state: round: expected 1 as the weights have it, found 2" in ended.err
