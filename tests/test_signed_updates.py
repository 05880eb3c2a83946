"""Signed updates, attack by attack: only a signed identity counts as a client's, and each counts once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_net import SmallBundle
from small_round import header, random_tensors, send, start_round

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.codecs import FLOAT32
from fedpara_edge.errors import BusyError, InputError, TooFewUpdatesError, TrustError
from fedpara_edge.formats.update import encode_update
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.trust.clients import read_clients
from fedpara_edge.trust.envelope import envelope_path, write_envelope
from fedpara_edge.trust.keys import new_key, read_signer
from fedpara_edge.trust.ledger import open_ledger
from fedpara_edge.trust.signatures import SignatureGate

NAMES = ("ann", "ben", "cid", "dan")
RUN = "winter"


class Server:
    """A server with the keys of four clients, and a round of theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.public = {name: new_key(folder / name) for name in (*NAMES, "mallory")}
        self.weights = start_round(folder)
        self.allow()

    def allow(self, **changed: Mapping[str, Any]) -> None:
        """Write the list of clients, with further fields for some."""
        lines = [f'run = "{RUN}"']
        for name in NAMES:
            lines += [f"[clients.{name}]", f'key = "{self.public[name]}"']
            lines += [f"{key} = {json.dumps(value)}" for key, value in changed.get(name, {}).items()]
        (self.folder / "clients.toml").write_text("\n".join(lines))

    def send(
        self, client: str, *, by: str | None = None, run: str = RUN, name: str | None = None, **changed: Any
    ) -> Path:
        """An update of a client, signed with its key or another one."""
        path = send(self.folder, self.weights, client, name=name or client, **changed)
        write_envelope(path, path, read_signer(self.folder / (by or client)), run)
        return path

    def honest(self) -> list[Path]:
        return [self.send(name) for name in NAMES]

    def round(self, *paths: Path, output: str = "next", **config: Any) -> Round:
        clients = read_clients(self.folder / "clients.toml")
        with open_ledger(self.folder / "ledger", clients.run) as ledger:
            return run_round(
                paths,
                self.folder / "base.safetensors",
                self.folder / f"{output}.safetensors",
                AggregateConfig(**config),
                gate=SignatureGate(clients, ledger),
            )


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def check_left_out(server: Server, bad: Path, code: str, words: str) -> None:
    """One file is refused, named with its client and reason, and the round is that of the honest ones alone."""
    alone = server.round(*server.honest(), output="alone")
    shutil.rmtree(server.folder / "ledger")
    both = server.round(*server.honest(), bad, output="both")
    (rejected,) = both.aggregation.rejected
    assert (rejected.path, rejected.code) == (bad, code)
    assert isinstance(rejected.error, TrustError)
    assert words in rejected.reason
    assert both.output.read_bytes() == alone.output.read_bytes()
    with pytest.raises(TrustError) as found:
        server.round(*server.honest(), bad, output="strict", strict=True)
    assert found.value.exit_code == 5
    assert not (server.folder / "strict.safetensors").exists()


def test_signed_updates_count_like_unsigned_ones(server: Server) -> None:
    signed = server.round(*server.honest())
    plain = run_round(server.honest(), server.folder / "base.safetensors", server.folder / "plain.safetensors")
    assert signed.output.read_bytes() == plain.output.read_bytes()
    assert [update.client for update in signed.aggregation.accepted] == list(NAMES)


def test_an_unsigned_update_under_an_honest_name(server: Server) -> None:
    bad = send(server.folder, server.weights, "ann", name="unsigned", change=random_tensors(server.weights.layout, 9))
    check_left_out(server, bad, "unsigned", "expected a signature in unsigned.update.dsse beside it, found none")


def test_a_key_that_nobody_knows(server: Server) -> None:
    bad = server.send("ann", by="mallory", name="bad", examples=11)
    check_left_out(server, bad, "unknown_client", "expected a signature by one key of the list")


def test_one_client_under_the_name_of_another(server: Server) -> None:
    bad = server.send("ann", by="ben", name="bad", examples=11)
    check_left_out(server, bad, "forged", "client 'ben': expected its own name to be signed with its key, found 'ann'")


def test_the_signature_of_another_file(server: Server) -> None:
    bad = send(server.folder, server.weights, "ann", name="bad", change=random_tensors(server.weights.layout, 9))
    shutil.copyfile(envelope_path(server.send("ann")), envelope_path(bad))
    check_left_out(server, bad, "forged", "expected the content that was signed, found other")


def test_a_key_id_without_its_signature(server: Server) -> None:
    bad = server.send("ann", by="mallory", name="bad")
    envelope = json.loads(envelope_path(bad).read_text())
    envelope["signatures"][0]["keyid"] = json.loads(envelope_path(server.send("ann")).read_text())["signatures"][0][
        "keyid"
    ]
    envelope_path(bad).write_text(json.dumps(envelope))
    check_left_out(server, bad, "forged", "found a forged one")


def test_an_update_of_another_run(server: Server) -> None:
    bad = server.send("ann", run="summer", name="bad")
    check_left_out(server, bad, "replay", "expected an update of run 'winter', found one of 'summer'")


def test_more_examples_than_a_client_may_claim(server: Server) -> None:
    server.allow(ann={"max_examples": 10})
    bad = server.send("ann", name="bad", examples=11)
    check_left_out(server, bad, "over_cap", "client 'ann': expected at most 10 examples, found 11 claimed")


def test_a_statement_that_is_not_that_of_the_header(server: Server) -> None:
    path = send(server.folder, server.weights, "ann", name="bad", examples=1000)
    other = send(server.folder, server.weights, "ann", name="small")
    write_envelope(other, path, read_signer(server.folder / "ann"), RUN)
    check_left_out(server, path, "forged", "examples: expected 10 as signed, found another")


def next_round(server: Server) -> None:
    """Go on to the round after."""
    server.round(*server.honest())
    (server.folder / "next.safetensors").replace(server.folder / "base.safetensors")
    server.weights = read_weights(server.folder / "base.safetensors")


def test_a_replay_in_the_next_round(server: Server) -> None:
    next_round(server)
    (server.folder / "ann.update").replace(server.folder / "old.update")
    envelope_path(server.folder / "ann.update").replace(server.folder / "old.update.dsse")
    done = server.round(*server.honest(), server.folder / "old.update")
    (rejected,) = done.aggregation.rejected
    assert rejected.code == "replay"
    assert "its one update of round 3" in rejected.reason
    with pytest.raises(TrustError, match="client 'ann'"):
        server.round(server.folder / "old.update", output="strict", strict=True)


def test_a_second_update_in_a_round_that_is_done_again(server: Server) -> None:
    first = server.round(*server.honest())
    bad = server.send("ann", name="second", examples=11)
    done = server.round(*(server.folder / f"{name}.update" for name in NAMES[1:]), bad, output="other")
    assert [(update.code, update.client) for update in done.aggregation.rejected] == [("replay", "ann")]
    assert server.round(*server.honest(), output="again").output.read_bytes() == first.output.read_bytes()


def test_revocation_takes_effect_at_the_next_round(server: Server) -> None:
    next_round(server)
    server.allow(ann={"revoked": True})
    done = server.round(*server.honest())
    assert [(update.code, update.client) for update in done.aggregation.rejected] == [("revoked", "ann")]
    assert [update.client for update in done.aggregation.accepted] == list(NAMES[1:])


def test_two_updates_signed_by_one_client_are_a_conflict_of_its_own(server: Server) -> None:
    done = server.round(*server.honest(), server.send("ann", name="second", examples=11))
    assert [(update.code, update.client) for update in done.aggregation.rejected] == [("conflict", "ann")] * 2


def test_nobody_is_left(server: Server) -> None:
    path = send(server.folder, server.weights, "ann")
    with pytest.raises(TooFewUpdatesError, match="1 unsigned"):
        server.round(path)
    assert not (server.folder / "ledger" / "round-3.json").exists()


def test_a_ledger_is_of_one_run_and_one_process(server: Server) -> None:
    server.round(*server.honest())
    with open_ledger(server.folder / "ledger", "summer") as ledger, pytest.raises(InputError, match="of its own"):
        ledger.accepted(3)
    with open_ledger(server.folder / "ledger", RUN), pytest.raises(BusyError):
        server.round(*server.honest(), output="other")
    (server.folder / "ledger" / "round-3.json").write_text("{}")
    with pytest.raises(InputError, match="bring back a copy"):
        server.round(*server.honest(), output="other")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_of_an_envelope_passes_or_crashes(server: Server, data: st.DataObject) -> None:
    path = server.send("ann")
    good = envelope_path(path).read_bytes()
    position = data.draw(st.integers(0, len(good) - 2))
    mutant = bytearray(good)
    mutant[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte != good[position]))
    envelope_path(path).write_bytes(bytes(mutant))
    try:
        server.round(path, output="mutant")
    except TooFewUpdatesError as error:
        (found,) = error.rejected
        assert isinstance(found, TrustError)
    else:  # a byte of the JSON that means nothing, such as a space
        assert json.loads(bytes(mutant))["payload"] == json.loads(good)["payload"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "run: expected a name, found None"),
        ('run = "a"', "clients: expected a table for each of them"),
        ('run = "a"\nclient = 1', "client: expected"),
        ('run = "a"\n[clients.ann]', "clients.ann.key: expected a public key"),
        ('run = "a"\n[clients.ann]\nkey = "rsa:00"', "clients.ann.key: expected ed25519"),
        ('run = "a"\n[clients.ann]\nkey = "ed25519:00"\nmax_examples = 0', "clients.ann.max_examples: expected"),
        ("=", "expected a TOML file"),
    ],
)
def test_a_list_of_clients_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "clients.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"clients.toml: {words}"):
        read_clients(path)


def test_a_list_of_clients_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clients.toml: expected a TOML file, found No such file or directory; check"):
        read_clients(tmp_path / "clients.toml")


def test_two_clients_have_two_keys(server: Server) -> None:
    server.public["ben"] = server.public["ann"]
    server.allow()
    with pytest.raises(InputError, match=r"clients\.ben\.key: expected a key of its own, found that of clients\.ann"):
        server.round()


TRAIN = ("train", "bundle", "--data", "d.npz")


@pytest.mark.usefixtures("here")
def test_the_commands(run: Command) -> None:
    assert run("keys", "new", "ann", "ben").code == 0
    public = run("keys", "show", "ann", "ben", "--json").json["keys"]
    Path("clients.toml").write_text(
        f'run = "{RUN}"\n' + "".join(f'[clients.{name}]\nkey = "{key}"\n' for name, key in public.items())
    )
    for name in ("ann", "ben"):
        ended = run(*TRAIN, "--client", name, "--state", f"s-{name}", "--key", name, "--run", RUN, "-o", f"{name}.up")
        assert ended.code == 0, ended.err
        assert Path(f"{name}.up.dsse").exists()
    run(*TRAIN, "--client", "ann", "--state", "s-bad", "--seed", "9", "-o", "bad.up")
    aggregate = ("aggregate", "ann.up", "ben.up", "--weights", "bundle/weights.safetensors", "-o")
    signed = (*aggregate, "w", "--allow", "clients.toml", "--ledger", "ledger")
    ended = run(*signed, "bad.up")
    assert ended.code == 0, ended.err
    assert "rejected [unsigned] bad.up: expected a signature" in ended.err
    assert "not signed" not in ended.err
    assert run(*signed, "bad.up").code == 0
    assert run(*signed, "bad.up", "--strict").code == 5
    unsigned = run(*aggregate, "v")
    assert unsigned.err == (
        "note: updates are not signed, so that anybody can send under any name; outside local work, pass --allow\n"
    )
    assert Path("v").read_bytes() == Path("w").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*TRAIN, "--state", "s", "-o", "u", "--key", "ann"), "--run: expected the name of the run"),
        ((*TRAIN, "--state", "s", "-o", "u", "--run", "winter"), "--run: expected with --key"),
        (("aggregate", "u", "--weights", "w", "-o", "x", "--allow", "c"), "--ledger: expected a folder"),
        (("aggregate", "u", "--weights", "w", "-o", "x", "--ledger", "l"), "--ledger: expected with --allow"),
    ],
)
@pytest.mark.usefixtures("here")
def test_options_that_do_not_go_together(run: Command, arguments: tuple[str, ...], words: str) -> None:
    ended = run(*arguments)
    assert (ended.code, words in ended.err) == (2, True), ended.err


def test_no_update_is_without_its_envelope(server: Server) -> None:
    """The envelope is written first, so that a kill in between leaves neither an unsigned update nor a lost one."""
    layout = server.weights.layout
    update = encode_update(header(server.weights, "ann"), layout, random_tensors(layout, 1), encoder=FLOAT32)
    path, seen = server.folder / "sealed.update", []

    def seal(temporary: Path, output: Path) -> None:
        seen.append((output, output.exists()))
        write_envelope(temporary, output, read_signer(server.folder / "ann"), RUN)

    replace(update, seal=seal).write(path)
    assert seen == [(path, False)]
    plain = server.folder / "plain.update"
    update.write(plain)
    assert plain.read_bytes() == path.read_bytes()
    server.round(path)


def test_a_device_signs_what_it_trains(small_bundle: SmallBundle, here: Path, run: Command) -> None:
    """Interrupted before the update is in place, the same command ends with both files."""
    del small_bundle
    run("keys", "new", "ann")
    command = (*TRAIN, "--client", "ann", "--state", "s", "--key", "ann", "--run", RUN, "-o", "u")
    assert run(*command).code == 0
    first = (Path("u").read_bytes(), Path("u.dsse").read_bytes())
    Path("u").unlink()
    Path("u.dsse").unlink()
    assert run(*command).code == 0
    assert (Path("u").read_bytes(), Path("u.dsse").read_bytes()) == first
    (here / "ann").chmod(0o644)
    ended = run(*command[:-1], "v")
    assert (ended.code, "mode 644" in ended.err) == (2, True)
    assert not Path("v").exists()
