"""What a server asks of updates beyond that they fit: signatures of listed clients, noise, budgets, bounds."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Served, base_of, bundle_in, serving, update_of, wait_until
from softmax_regression import SoftmaxRegression, write_npz

from device_runtime import tuning
from device_runtime.agent.agent import AgentConfig, AgentResult, run_agent
from device_runtime.agent.connection import Connection
from device_runtime.agent.member import Member
from device_runtime.agent.transfers import send
from device_runtime.sources import Reading
from fedpara_edge.aggregation import AggregateConfig
from fedpara_edge.cli.received import find_seals
from fedpara_edge.errors import InputError, InvalidUpdateError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.serving.guarding import Demands
from fedpara_edge.serving.rounds import envelope_of, read_result
from fedpara_edge.storage.rounds import round_path
from fedpara_edge.trust.envelope import write_envelope
from fedpara_edge.trust.keys import new_key, read_signer

RUN = "winter"


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "open_engine", lambda bundle, *_, **__: SoftmaxRegression(bundle))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_in(tmp_path)


def list_of(folder: Path, *clients: str, revoked: tuple[str, ...] = ()) -> Path:
    """A list of clients, each with a key of its own."""
    lines = [f'run = "{RUN}"']
    for client in clients:
        key = folder / f"{client}.key"
        public = key.with_name(f"{key.name}.pub").read_text().strip() if key.exists() else new_key(key)
        lines += [f"[clients.{client}]", f'key = "{public}"', f"revoked = {str(client in revoked).lower()}"]
    path = folder / "clients.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def take_part(
    served: Served, folder: Path, client: str, *, key: Path | None, own: Mapping[str, Any] = {}
) -> AgentResult:
    data = folder / f"{client}.npz"
    if not data.exists():
        write_npz(data)
    return run_agent(
        served.link, data, folder / client, AgentConfig(patience=20, rounds=1), reading=Reading(), client=client,
        own=own, seals=None if key is None else find_seals(key), on_event=lambda *_, **__: None,
    )  # fmt: skip


def test_signed_updates_of_listed_clients_count(tmp_path: Path, bundle: Bundle) -> None:
    allow, server = list_of(tmp_path, "ann", "ben"), tmp_path / "server"
    with serving(server, bundle, demands=Demands(allow=allow), updates=1) as served:
        assert take_part(served, tmp_path, "ann", key=tmp_path / "ann.key").rounds == (0,)
        served.wait_for_round(1)
        assert not (tmp_path / "ann" / "update.safetensors.dsse").exists()
        with pytest.raises(InputError, match=r"key: expected this device's private key, .* run 'winter'"):
            take_part(served, tmp_path, "ben", key=None)
    (update,) = (server / "rounds" / "0" / "updates").glob("*.safetensors")
    assert json.loads(envelope_of(update).read_text())["signatures"]
    assert json.loads((server / "ledger" / "round-0.json").read_text())["accepted"].keys() == {"ann"}
    port = served.running.port
    with serving(server, bundle, demands=Demands(allow=allow), port=port, updates=1) as served:
        assert take_part(served, tmp_path, "ann", key=tmp_path / "ann.key").rounds == (1,), "after a restart"


def test_what_is_not_signed_by_its_client_is_refused_by_name(tmp_path: Path, bundle: Bundle) -> None:
    allow = list_of(tmp_path, "ann", "ben")
    with serving(tmp_path / "server", bundle, demands=Demands(allow=allow), updates=2) as served:
        member = served.member(tmp_path / "ann", "ann")
        assert member.task(wait=False).run == RUN
        update = update_of(tmp_path / "sent", base_of(bundle), "ann")

        def refusal(signed_by: str | None, run: str = RUN) -> str:
            envelope_of(update).unlink(missing_ok=True)
            if signed_by is not None:
                write_envelope(update, update, read_signer(tmp_path / f"{signed_by}.key"), run)
            with pytest.raises(InvalidUpdateError) as refused:
                send(member.connection, "updates", update)
            return str(refused.value)

        for found, text in (
            (refusal(None), "expected a signature"),
            (refusal("ben"), "expected its own name to be signed with its key"),
            (refusal("ann", "summer"), "expected an update of run 'winter'"),
        ):
            assert found.startswith("the server: update of 'ann': "), found
            assert text in found
            assert str(tmp_path) not in found
        for sent, status in (("no base64!", 400), (base64.b64encode(b"x" * 3000).decode(), 422)):
            fields = {"Update-Envelope": sent}
            answer = member.connection.request("POST", "updates", body=update.read_bytes(), headers=fields)
            assert answer.status == status
        assert served.running.federation.round.count == 0
        codes = [refusal.code for refusal in served.running.federation.round.refused]
        assert codes[:3] == ["unsigned", "forged", "replay"]
        write_envelope(update, update, read_signer(tmp_path / "ann.key"), RUN)
        assert send(member.connection, "updates", update)


@pytest.mark.slow
def test_a_list_that_is_changed_counts_at_once(tmp_path: Path, bundle: Bundle) -> None:
    """Whoever is added is asked in the round that is open, and what a revoked client has sent in it is left out."""
    allow = list_of(tmp_path, "ann", "ben")
    with serving(tmp_path / "server", bundle, demands=Demands(allow=allow), updates=3) as served:
        guest = served.member(tmp_path / "cat", "cat")
        task = guest.task(wait=False)
        assert task.reason == "expected a device on the server's list, found 'cat'; have its public key added"
        assert task.code == "unlisted"
        assert take_part(served, tmp_path, "ben", key=tmp_path / "ben.key").rounds == (0,)
        allow.write_text("run =")
        wait_for_event(served, "error", "clients.toml: expected a TOML file")
        assert served.running.federation.phase == "open", "by the list that was there"
        list_of(tmp_path, "ann", "ben", "cat", revoked=("ben",))
        wait_for_event(served, "list_read", "")
        assert guest.task(wait=False).train
        other = served.member(tmp_path / "other", "other")
        assert other.task(wait=False).code == "unlisted"
        for client in ("ann", "cat"):
            take_part(served, tmp_path, client, key=tmp_path / f"{client}.key")
        served.wait_for_round(1)
        ben = Member(tmp_path / "ben", Connection(served.url))
        assert (ben.task(wait=False).code, ben.task(wait=False).reason) == (
            "revoked",
            "the key of this device was revoked",
        )
    result = read_result(tmp_path / "server" / "rounds" / "0")
    assert result is not None
    assert [update["client"] for update in result["accepted"]] == ["ann", "cat"]
    assert [update["client"] for update in result["rejected"]] == ["ben"]


def wait_for_event(served: Served, name: str, message: str) -> None:
    def is_told() -> bool:
        return any(event == name and message in fields.get("message", "") for event, fields in served.events)

    wait_until(is_told, served.events)


def test_a_key_without_a_list_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    new_key(tmp_path / "ann.key")
    with (
        serving(tmp_path / "server", bundle, updates=1) as served,
        pytest.raises(InputError, match="key: expected with a server that has a list"),
    ):
        take_part(served, tmp_path, "ann", key=tmp_path / "ann.key")


@pytest.mark.slow
def test_a_budget_ends_the_federation(tmp_path: Path, bundle: Bundle) -> None:
    aggregate = AggregateConfig(privacy="gaussian:clip=1,noise=2,expected=1,epsilon=4,delta=1e-5")
    server = tmp_path / "server"
    with serving(server, bundle, aggregate=aggregate, updates=1) as served:
        rounds = 0
        while served.running.federation.phase != "finished":
            member = served.member(tmp_path / "ann", "ann")
            task = member.task(wait=False)
            member.receive(task, member.bundle(task))
            send(member.connection, "updates", update_of(tmp_path / "sent", read_weights(member.weights), "ann"))
            rounds += 1
            served.wait_for_round(rounds)
        assert 1 <= rounds < 20
        assert "expected at most ε 4 at δ 1e-05" in str(served.running.federation.error)
        result = read_result(server / "rounds" / str(rounds - 1))
        assert result is not None
        assert 0 < result["privacy"]["spent"] <= 4
    with serving(server, bundle, aggregate=aggregate, updates=1) as served:
        assert served.running.federation.phase == "finished", "after a restart"


def test_updates_without_noise_of_their_device_are_refused(tmp_path: Path, bundle: Bundle) -> None:
    demands = Demands(device_privacy="gaussian:epsilon=9,delta=1e-5")
    with serving(tmp_path / "server", bundle, demands=demands, updates=1) as served:
        assert take_part_refused(served, tmp_path)
        own = {"privacy": "gaussian:clip=0.5,noise=40,epsilon=8,delta=1e-5"}
        assert take_part(served, tmp_path, "ann", key=None, own=own).rounds == (0,)
        served.wait_for_round(1)
    spent = json.loads((tmp_path / "server" / "privacy" / "devices.json").read_text())["spent"]
    assert spent == {"ann": [[40.0, 1]]}


def take_part_refused(served: Served, folder: Path) -> bool:
    member = served.member(folder / "ben", "ben")
    assert member.task(wait=False).train
    with pytest.raises(InvalidUpdateError, match="update of 'ben': expected noise that its device added"):
        send(member.connection, "updates", update_of(folder / "sent", member_base(served), "ben"))
    return True


def member_base(served: Served) -> Any:
    return served.running.federation.current.base


@pytest.mark.parametrize("options", [{"rule": "median"}, {"max_norm": 1.5}, {"rule": "trimmed:share=0.34"}])
def test_rules_and_bounds_hold_against_one_device(tmp_path: Path, bundle: Bundle, options: dict[str, Any]) -> None:
    base = base_of(bundle)
    huge = {name: np.full_like(tensor, 1e4) for name, tensor in base.tensors.items()}
    with serving(tmp_path / "server", bundle, aggregate=AggregateConfig(**options), updates=4) as served:
        for client in ("ann", "ben", "cat", "mallory"):
            member = served.member(tmp_path / client, client)
            assert member.task(wait=False).train
            change = {"change": huge} if client == "mallory" else {}
            send(member.connection, "updates", update_of(tmp_path / "sent", base, client, **change))
        served.wait_for_round(1)
    after = read_weights(round_path(tmp_path / "server" / "weights", 1))
    moved = max(float(np.abs(after.tensors[name] - base.tensors[name]).max()) for name in base.tensors)
    assert moved < 1, "of 1e4"
