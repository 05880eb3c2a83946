"""Anybody can recompute a round: from its transcript and the updates to the published weights, to the last bit."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from command_line import Command
from small_round import forge, send, start_round

from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.errors import InputError, OutputExistsError, TrustError
from fedpara_edge.formats.transcript import read_transcript, tree_hash
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.trust.audit import audit
from fedpara_edge.trust.envelope import envelope_path, write_envelope
from fedpara_edge.trust.keys import new_key, read_signer

CONFIGS = {
    "mean": {},
    "equal": {"weighting": "equal", "max_share": 0.9},
    "refit": {"merge": "refit"},
    "adam": {"algorithm": "fedadam:lr=0.1"},
    "downlink": {"downlink_codec": "int4"},
}


class Done:
    """A round of five clients in a folder, one of whose updates was refused, with its transcript."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        self.base, self.published = folder / "base.safetensors", folder / "next.safetensors"
        weights = start_round(folder, number=0)
        self.updates = [send(folder, weights, f"client-{n}", examples=10 + n) for n in range(4)]
        self.updates.append(forge(folder / "bad.update", weights, drop="steps"))
        config = AggregateConfig(**options)  # type: ignore[arg-type]
        keeps = bool(config.server_algorithm.groups) or config.downlink_codec is not None
        self.state = folder / "server" if keeps else None
        change = folder / "change" if config.downlink_codec is not None else None
        self.path = folder / "transcript.json"
        run_round(
            self.updates, self.base, self.published, config, state=self.state, change=change, transcript=self.path
        )

    def audit(self, updates: list[Path] | None = None) -> None:
        audit(read_transcript(self.path), updates or self.updates, self.base, self.published, state=self.state)

    def changed(self, **fields: object) -> None:
        self.path.write_text(json.dumps({**json.loads(self.path.read_text()), **fields}))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_audit_leads_to_the_published_weights(name: str, tmp_path: Path) -> None:
    done = Done(tmp_path, **CONFIGS[name])
    shuffled = random.Random(name).sample(done.updates, len(done.updates))
    done.audit(shuffled)


def test_published_weights_of_something_else(tmp_path: Path) -> None:
    done = Done(tmp_path)
    weights = read_weights(done.published)
    weights.tensors["fc.bias"][0] += 1e-6
    write_weights(done.published, weights)
    with pytest.raises(TrustError, match="they are not those of the updates"):
        done.audit()
    done.changed(result=read_weights(done.published).base)
    with pytest.raises(TrustError, match="they are not those of the updates"):
        done.audit()


def test_an_update_that_was_left_out_or_put_in(tmp_path: Path) -> None:
    done = Done(tmp_path)
    with pytest.raises(TrustError, match=r"1 of them missing, the first that of 'client-2'"):
        done.audit([path for path in done.updates if path.stem != "client-2"])
    updates = json.loads(done.path.read_text())["updates"]
    done.changed(updates=updates[1:])
    with pytest.raises(TrustError, match="the list was changed"):
        done.audit()
    done.changed(tree=tree_hash([update["sha256"] for update in updates[1:]]))
    with pytest.raises(TrustError, match="they are not those of the updates"):
        done.audit()


def test_other_options_than_were_used(tmp_path: Path) -> None:
    done = Done(tmp_path)
    done.changed(config={"weighting": "equal"})
    with pytest.raises(TrustError, match="they are not those of the updates"):
        done.audit()
    done.path.write_text("{}")
    with pytest.raises(InputError, match="expected a transcript of a round"):
        done.audit()
    done.path.unlink()
    with pytest.raises(InputError, match=r"of a round, found No such file or directory; check the path$"):
        done.audit()


def test_other_clients_or_examples_than_those_of_the_files(tmp_path: Path) -> None:
    done = Done(tmp_path, weighting="equal")
    updates = json.loads(done.path.read_text())["updates"]
    for field, value in (("client", "mallory"), ("examples", 9)):
        done.changed(updates=[{**updates[0], field: value}, *updates[1:]])
        with pytest.raises(TrustError, match="found other clients or examples in the transcript"):
            done.audit()


def test_a_transcript_is_written_before_the_weights_and_never_over_another(tmp_path: Path) -> None:
    done = Done(tmp_path)
    weights, transcript = done.published.read_bytes(), done.path.read_bytes()
    done.published.unlink()
    with pytest.raises(OutputExistsError, match=r"transcript\.json"):
        run_round(done.updates[:3], done.base, done.published, transcript=done.path)
    assert (done.published.exists(), done.path.read_bytes()) == (False, transcript)
    done.path.write_text("another")
    with pytest.raises(OutputExistsError, match=r"transcript\.json"):
        run_round(done.updates, done.base, done.published, transcript=done.path)
    assert not done.published.exists()
    done.path.write_bytes(transcript)
    run_round(done.updates, done.base, done.published, transcript=done.path)
    assert done.published.read_bytes() == weights
    done.path.unlink()
    run_round(done.updates, done.base, done.published, transcript=done.path)
    assert done.path.read_bytes() == transcript


def test_signatures_are_verified_again(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = start_round(tmp_path)
    public = {name: new_key(tmp_path / name) for name in ("ann", "ben")}
    clients = "".join(f'[clients.{name}]\nkey = "{key}"\n' for name, key in public.items())
    Path("clients.toml").write_text(f'run = "winter"\n{clients}')
    updates = [send(tmp_path, weights, name) for name in public]
    for update in updates:
        write_envelope(update, update, read_signer(update.with_suffix("")), "winter")
    given = (*updates, "--weights", "base.safetensors", "--allow", "clients.toml")
    assert run("aggregate", *given, "--ledger", "l", "--transcript", "t.json", "-o", "w.safetensors").code == 0
    audit = ("audit", "t.json", *given, "--published", "w.safetensors")
    Path("clients.toml").write_text(f'run = "winter"\n{clients}revoked = true\n')  # after the round
    ended = run(*audit)
    assert (ended.code, ended.out.endswith("to the last bit, each signed by its client\n")) == (0, True), ended.err
    write_envelope(updates[1], updates[1], read_signer(Path("ann")), "winter")
    ended = run(*audit)
    assert (ended.code, "client 'ann': expected its own name to be signed" in ended.err) == (5, True), ended.err
    envelope_path(updates[1]).unlink()
    unsigned = [part for part in audit if part not in ("--allow", "clients.toml")]
    assert (run(*audit).code, run(*unsigned).code) == (5, 0)


def test_the_tree_is_that_of_rfc_6962() -> None:
    """Test vectors of Certificate Transparency, whose leaves are the first of these byte strings."""
    leaves = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    roots = {
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    assert tree_hash([]) == hashlib.sha256().hexdigest()
    assert {count: tree_hash(leaves[:count]) for count in roots} == roots


def test_the_commands(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = start_round(tmp_path)
    updates = [send(tmp_path, weights, name) for name in ("ann", "ben", "cid")]
    command = ("aggregate", *updates, "--weights", "base.safetensors", "--transcript", "t.json", "-o", "w.safetensors")
    assert run(*command).code == 0
    assert run(*command).code == 0  # as it would write the very same
    audited = ("audit", "t.json", *updates, "--weights", "base.safetensors", "--published", "w.safetensors")
    ended = run(*audited)
    assert (ended.code, ended.out) == (0, "w.safetensors: round 4 is that of the 3 updates, to the last bit\n")
    updates[0].unlink()
    ended = run(*("audit", "t.json", *updates[1:], *audited[5:]))
    assert (ended.code, "1 of them missing" in ended.err) == (5, True)
