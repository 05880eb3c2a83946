"""Late updates: their change since their own base, discounted, and each once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from small_round import LAYOUT, flat, random_tensors, send, start_round

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.aggregation.partials import make_partial
from fedpara_edge.errors import InputError, TooFewUpdatesError
from fedpara_edge.formats.transcript import read_transcript
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.trust.audit import audit
from fedpara_edge.trust.clients import read_clients
from fedpara_edge.trust.envelope import write_envelope
from fedpara_edge.trust.keys import new_key, read_signer
from fedpara_edge.trust.ledger import open_ledger
from fedpara_edge.trust.signatures import SignatureGate

TWO = AggregateConfig(max_staleness=2, max_norm=10)


class Server:
    """A server that takes updates which are up to two rounds late; weights of round n are in `wn`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        start_round(folder, number=0)
        (folder / "base.safetensors").rename(folder / "w0")

    def weights(self, number: int) -> Weights:
        return read_weights(self.folder / f"w{number}")

    def send(self, client: str, number: int, **changed: Any) -> Path:
        """An update of a client, trained from the weights of a round."""
        return send(self.folder, self.weights(number), client, name=f"{client}-{number}", **changed)

    def round(self, number: int, files: list[Path], config: AggregateConfig = TWO, **options: Any) -> Round:
        """The round that leads to the weights of that number."""
        weights, output = self.folder / f"w{number - 1}", self.folder / f"w{number}"
        return run_round(files, weights, output, config, state=self.folder / "server", **options)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """A server with two rounds of a and b behind it."""
    server = Server(tmp_path)
    for number in (0, 1):
        server.round(number + 1, [server.send(client, number) for client in "ab"])
    return server


def change(seed: int) -> dict[str, Any]:
    return random_tensors(LAYOUT, seed, 0.1)


def codes(done: Round) -> dict[str, str]:
    return {each.path.name: each.code for each in done.aggregation.rejected}


def test_a_late_change_is_added_to_the_newest_weights_for_less(server: Server) -> None:
    """By the formula of FedBuff: Σ s_i d_i / √(1 + τ_i), with the shares of a round in which nobody is late."""
    late, later, timely = (server.send(*each) for each in (("c", 1), ("d", 0), ("a", 2)))
    done = server.round(3, [late, later, timely])
    assert [(each.client, each.staleness, each.share) for each in done.aggregation.accepted] == [
        ("a", 0, pytest.approx(1 / 3)),
        ("c", 1, pytest.approx(1 / 3)),
        ("d", 2, pytest.approx(1 / 3)),
    ]
    sent = {client: flat(change(ord(client))) for client in "acd"}
    expected = (sent["a"] + sent["c"] / np.sqrt(2) + sent["d"] / np.sqrt(3)) / 3
    found = flat(server.weights(3).tensors) - flat(server.weights(2).tensors)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_is_too_late_or_has_counted_is_refused(server: Server) -> None:
    server.round(3, [server.send("a", 2), server.send("c", 1)])
    files = [server.send("a", 3), server.send("e", 0), server.send("c", 1), server.send("a", 1), server.send("a", 2)]
    assert codes(server.round(4, files)) == {
        "e-0.update": "wrong_round",
        "c-1.update": "duplicate",
        "a-1.update": "duplicate",
        "a-2.update": "duplicate",
    }


def test_a_client_that_was_late_counts_in_its_round_too(server: Server) -> None:
    done = server.round(3, [server.send("c", 1), server.send("c", 2)])
    assert [(each.client, each.staleness) for each in done.aggregation.accepted] == [("c", 1), ("c", 0)]


def test_from_other_weights_of_that_round_is_refused(server: Server) -> None:
    foreign = send(server.folder, server.weights(1), "z", base="0" * 64)
    assert codes(server.round(3, [server.send("a", 2), foreign])) == {"z.update": "wrong_base"}


def test_a_round_that_is_done_again_is_the_same(server: Server) -> None:
    files = [server.send("a", 2), server.send("c", 1)]
    first = server.round(3, files).aggregation.weights.base
    (server.folder / "w3").unlink()
    assert server.round(3, files).aggregation.weights.base == first


def test_nothing_is_remembered_and_nothing_late_counts_unless_asked_for(tmp_path: Path) -> None:
    server, plain = Server(tmp_path), AggregateConfig()
    server.round(1, [server.send("a", 0)], plain)
    with TensorFile(tmp_path / "server" / "round-1.safetensors", format=None, error=InputError) as file:
        assert "history" not in file.header
    files = [server.send("a", 1), server.send("b", 0)]
    assert codes(server.round(2, files, plain)) == {"b-0.update": "wrong_round"}
    # What happened before the first round with the option is not known, and so nothing of it counts.
    files = [server.send("a", 2), server.send("b", 1)]
    assert codes(server.round(3, files)) == {"b-1.update": "wrong_round"}
    files = [server.send("a", 3), server.send("b", 2)]
    assert codes(server.round(4, files)) == {}


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_with_late_updates_is_the_single_pass(seed: int, server: Server) -> None:
    files = [server.send(*each) for each in (("a", 2), ("b", 2), ("c", 1), ("c", 2), ("d", 0), ("e", 1))]
    exact = AggregateConfig(max_staleness=2, exact=True)
    dice = random.Random(seed)
    dice.shuffle(files)
    tree = list(files)
    for step in range(3):
        taken = [tree.pop() for _ in range(dice.randrange(1, 3))]
        part = server.folder / f"part-{step}"
        make_partial(taken, server.folder / "w2", part, exact, state=server.folder / "server")
        tree.insert(0, part)
    found = server.round(3, tree, exact).aggregation
    state = (server.folder / "server" / "round-3.safetensors").read_bytes()
    (server.folder / "w3").unlink()
    single = server.round(3, files, exact).aggregation
    assert found.weights.base == single.weights.base
    assert state == (server.folder / "server" / "round-3.safetensors").read_bytes()


def test_partials_without_the_option_refuse_late_updates(server: Server) -> None:
    late, exact = server.send("c", 1), AggregateConfig(max_staleness=2, exact=True)
    make_partial([late], server.folder / "w2", server.folder / "part", exact, state=server.folder / "server")
    with pytest.raises(TooFewUpdatesError, match="round: expected 2, found 1"):
        server.round(3, [server.folder / "part"], AggregateConfig(exact=True))
    with pytest.raises(InputError, match="state: expected the folder that knows the rounds before"):
        make_partial([late], server.folder / "w2", server.folder / "other", exact)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithm": "scaffold:clients=4"}, "algorithm scaffold"),
        ({"algorithm": "feddyn:clients=4"}, "algorithm feddyn"),
        ({"privacy": "gaussian:clip=1,noise=1,expected=9,epsilon=8,delta=1e-5"}, "privacy"),
    ],
)
def test_what_late_updates_do_not_go_with(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"expected 0 with {words}, found 1") as caught:
        AggregateConfig(max_staleness=1, **options)
    assert caught.value.key == "max_staleness"


def test_without_a_state_folder_there_is_no_memory(server: Server) -> None:
    with pytest.raises(InputError, match="a round that takes late updates keeps"):
        run_round([], server.folder / "w2", server.folder / "w3", TWO)


def test_a_round_with_late_updates_is_audited(server: Server) -> None:
    files = [server.send("a", 2), server.send("c", 1)]
    path = server.folder / "transcript"
    server.round(3, files, transcript=path)
    base, published = server.folder / "w2", server.folder / "w3"
    audit(read_transcript(path), files, base, published, state=server.folder / "server")


def test_signed_late_updates_count_once(server: Server) -> None:
    """In the round of the ledger that they were trained in, also when a round is done again."""
    folder = server.folder
    lines = ['run = "winter"', *(f'[clients.{name}]\nkey = "{new_key(folder / name)}"' for name in "abc")]
    (folder / "clients.toml").write_text("\n".join(lines))

    def signed(client: str, number: int) -> Path:
        path = server.send(client, number)
        write_envelope(path, path, read_signer(folder / client), "winter")
        return path

    def round_(number: int, files: list[Path]) -> Round:
        clients = read_clients(folder / "clients.toml")
        with open_ledger(folder / "ledger", clients.run) as ledger:
            return server.round(number, files, gate=SignatureGate(clients, ledger, max_staleness=2))

    files = [signed("a", 2), signed("c", 1)]
    first = round_(3, files).aggregation.weights.base
    (folder / "w3").unlink()
    assert round_(3, files).aggregation.weights.base == first
    assert codes(round_(4, [signed("a", 3), *files, signed("c", 2)])) == {
        "a-2.update": "duplicate",
        "c-1.update": "duplicate",
    }


def test_the_command_takes_late_updates(run: Command, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(server.folder)
    files = [server.send("a", 2).name, server.send("c", 1).name]
    late = ("--weights", "w2", "--max-staleness", "1", "--state", "server")
    assert run("aggregate", "--partial", *files, *late, "-o", "part").code == 0
    assert run("merge", "part", *late, "-o", "merged").code == 0
    assert "from 2 updates (20 examples), 0 rejected, 1 late" in run("finalize", "merged", *late, "-o", "w3").out
    done = run("finalize", "merged", *late, "-o", "w3", "--json").json
    assert [each["staleness"] for each in done["accepted"]] == [0, 1]
    assert run("finalize", "part", "--weights", "w2", "--max-staleness", "1", "-o", "x").code == 2
