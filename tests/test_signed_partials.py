"""Partials signed by aggregators, attack by attack, and a tree whose every part is signed, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from signed import RUN
from small_round import random_tensors, send, start_round

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.aggregation.partials import make_partial
from fedpara_edge.errors import InputError, OutputExistsError, TooFewUpdatesError
from fedpara_edge.trust.clients import read_clients
from fedpara_edge.trust.envelope import envelope_path, write_envelope, write_partial_envelope
from fedpara_edge.trust.keys import new_key, read_signer
from fedpara_edge.trust.ledger import open_ledger
from fedpara_edge.trust.signatures import SignatureGate

CLIENTS, AGGREGATORS = ("ann", "ben", "cid"), ("east", "west")


class Tree:
    """A server with the keys of clients and aggregators, and a round of theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.public = {name: new_key(folder / name) for name in (*CLIENTS, *AGGREGATORS, "mallory")}
        self.base = folder / "base.safetensors"
        self.weights = start_round(folder, number=0)
        self.updates = {name: self.sign(send(folder, self.weights, name), name) for name in CLIENTS}
        self.allow()

    def sign(self, path: Path, by: str) -> Path:
        write_envelope(path, path, read_signer(self.folder / by), RUN)
        return path

    def allow(self, **changed: Any) -> None:
        """Write the list, with further fields for some, and without those that are None."""
        lines = [f'run = "{RUN}"']
        for table, names in (("clients", CLIENTS), ("aggregators", AGGREGATORS)):
            for name in names:
                if (more := changed.get(name, {})) is not None:
                    lines += [f"[{table}.{name}]", f'key = "{self.public[name]}"']
                    lines += [f"{key} = {json.dumps(value)}" for key, value in more.items()]
        (self.folder / "clients.toml").write_text("\n".join(lines))

    def part(self, name: str, *clients: str, by: str | None = "east", run: str = RUN, **options: Any) -> Path:
        path = self.folder / f"{name}.partial"
        key = None if by is None else read_signer(self.folder / by)
        seal = None if key is None else lambda complete, output: write_partial_envelope(complete, output, key, run)
        make_partial([self.updates[client] for client in clients], self.base, path, seal=seal, **options)
        return path

    def finalize(self, *paths: Path, **config: Any) -> Round:
        clients = read_clients(self.folder / "clients.toml")
        with open_ledger(self.folder / "ledger", clients.run) as ledger:
            return run_round(
                paths,
                self.base,
                self.folder / "next.safetensors",
                AggregateConfig(exact=True, **config),
                gate=SignatureGate(clients, ledger),
                overwrite=True,
            )

    def entries(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.folder / "ledger" / "round-0.json").read_text())["accepted"]
        return found


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def refused(tree: Tree, *paths: Path) -> list[str]:
    with pytest.raises(TooFewUpdatesError) as found:
        tree.finalize(*paths)
    return [error.code for error in found.value.rejected]


def test_signed_partials_and_updates_lead_to_the_single_pass(tree: Tree) -> None:
    parts = [tree.part("one", "ann", "ben"), tree.updates["cid"]]
    once = tree.finalize(*parts).output.read_bytes()
    assert tree.finalize(*tree.updates.values()).output.read_bytes() == once
    assert tree.finalize(*parts).output.read_bytes() == once  # and again, with what the ledger has
    assert sorted(tree.entries()) == sorted(CLIENTS)


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("unsigned", lambda tree: tree.part("p", "ann", by=None)),
        ("unknown_client", lambda tree: tree.part("p", "ann", by="mallory")),
        ("unknown_client", lambda tree: tree.part("p", "ann", by="ben")),  # a client is no aggregator
        ("replay", lambda tree: tree.part("p", "ann", run="summer")),
    ],
)
def test_partials_of_nobody_on_the_list(code: str, make: Any, tree: Tree) -> None:
    assert refused(tree, make(tree)) == [code]


def test_an_update_signed_by_an_aggregator(tree: Tree) -> None:
    assert refused(tree, tree.sign(send(tree.folder, tree.weights, "ann", name="x"), "east")) == ["unknown_client"]


def test_the_signature_of_another_partial(tree: Tree) -> None:
    one, other = tree.part("one", "ann"), tree.part("other", "ann", "ben")
    envelope_path(other).write_bytes(envelope_path(one).read_bytes())
    assert refused(tree, other) == ["forged"]


def test_the_signature_of_an_update_beside_a_partial(tree: Tree) -> None:
    one = tree.part("one", "ann")
    envelope_path(one).write_bytes(envelope_path(tree.updates["ann"]).read_bytes())
    assert refused(tree, one) == ["unknown_client"]


def test_a_partial_that_was_changed(tree: Tree) -> None:
    one = tree.part("one", "ann")
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)
    assert refused(tree, one)[0] in ("digest", "partial")


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("revoked", {"east": {"revoked": True}}),
        ("revoked", {"ben": {"revoked": True}}),
        ("over_cap", {"ben": {"max_examples": 9}}),
        ("unknown_client", {"ben": None}),
    ],
)
def test_the_list_binds_what_is_in_a_partial(code: str, changed: dict[str, Any], tree: Tree) -> None:
    one = tree.part("one", "ann", "ben")
    tree.allow(**changed)
    assert refused(tree, one) == [code]


def test_an_update_that_was_accepted_in_its_round_is_not_exchanged_in_a_partial(tree: Tree) -> None:
    tree.finalize(tree.updates["ann"])
    change = random_tensors(tree.weights.layout, 9)
    tree.updates["ann"] = tree.sign(send(tree.folder, tree.weights, "ann", name="again", change=change), "ann")
    assert refused(tree, tree.part("one", "ann", "ben")) == ["replay"]


def test_a_bad_partial_stops_nobody(tree: Tree) -> None:
    bad = tree.part("bad", "ann", by="mallory")
    done = tree.finalize(bad, tree.part("good", "ben"), tree.updates["cid"])
    assert [update.client for update in done.aggregation.accepted] == ["ben", "cid"]


def test_a_signature_is_not_exchanged_for_that_of_what_was_not_written(tree: Tree) -> None:
    one = tree.part("one", "ann")
    envelope = envelope_path(one).read_bytes()
    with pytest.raises(OutputExistsError):
        tree.part("one", "ann", "ben")
    assert envelope_path(one).read_bytes() == envelope
    assert tree.finalize(one).number == 1


def test_a_key_is_a_clients_or_an_aggregators(tree: Tree) -> None:
    path = tree.folder / "clients.toml"
    path.write_text(path.read_text().replace(tree.public["west"], tree.public["ann"]))
    with pytest.raises(
        InputError, match=r"aggregators\.west\.key: expected a key of its own, found that of clients\.ann"
    ):
        read_clients(path)


def test_a_tree_as_it_is_typed(tree: Tree, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.folder)
    weights, allow = ("--weights", "base.safetensors"), ("--allow", "clients.toml")

    def succeed(*arguments: str) -> None:
        ended = run(*arguments)
        assert (ended.code, ended.err) == (0, "")

    for _ in range(2):  # the same commands again complete and change nothing
        leaf = ("--partial", *weights, *allow, "--ledger", "east-ledger", "--key", "east")
        succeed("aggregate", "ann.update", "ben.update", *leaf, "-o", "east.partial")
        succeed("merge", "east.partial", "cid.update", *weights, *allow, "--ledger", "w", "--key", "west", "-o", "all")
        succeed("finalize", "all", *weights, *allow, "--state", "server", "-o", "next", "--transcript", "list.json")
    updates = [f"{name}.update" for name in CLIENTS]
    succeed("audit", "list.json", *updates, *weights, *allow, "--published", "next")
    assert json.loads((tree.folder / "server" / "ledger" / "round-0.json").read_text())["accepted"].keys() == {*CLIENTS}
    alone = run("aggregate", "ann.update", *weights, "-o", "x", "--key", "east")
    assert (alone.code, "--key: expected with --partial, found without" in alone.err) == (2, True)
    other = run("merge", "all", *weights, *allow, "--ledger", "w", "--key", "west", "--run", "summer", "-o", "y")
    assert (other.code, "--run: expected 'winter', that of clients.toml" in other.err) == (2, True)
    plain = run("aggregate", "all", *weights, "-o", "x")
    assert "found fedpara-edge/partial; give partials to finalize or merge" in plain.err
