"""A federation on its state folder: rounds, participants, and updates that are taken once, however the server ends."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from disk_calls import KILL, Fault, can_watch, run_watched
from served import base_of, bundle_in, federation_in, record_in, update_of
from small_round import forge
from softmax_regression import make_bundle

from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.errors import BusyError, FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.bundle import Bundle, open_bundle
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.serving.federation import Federation
from fedpara_edge.serving.folder import open_folder
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.serving.rounds import RoundFolder
from fedpara_edge.storage.rounds import round_path


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_in(tmp_path)


@pytest.fixture
def clock() -> list[float]:
    """The time, to be set."""
    return [1000.0]


def join(federation: Federation, *clients: str) -> None:
    for client in clients:
        federation.devices.join(client, f"proof of {client}", now=0)


def take(federation: Federation, update: Path, client: str) -> bool:
    """Take a copy of an update; whether it is new."""
    arrived = update.with_suffix(".arrived")
    shutil.copy(update, arrived)
    return federation.take(arrived, client).is_new


def test_a_round_closes_by_its_updates_and_equals_aggregate(tmp_path: Path, bundle: Bundle) -> None:
    base = base_of(bundle)
    updates = [update_of(tmp_path / "sent", base, client) for client in ("ann", "ben")]
    with federation_in(tmp_path / "server", bundle) as federation:
        join(federation, "ann", "ben")
        for client, update in zip(("ann", "ben"), updates, strict=True):
            assert federation.task(client).train
            assert federation.seconds_left() is None
            assert take(federation, update, client)
            assert not federation.task(client).train
        assert federation.seconds_left() == 0
        federation.close()
        assert federation.phase == "closing"
        federation.advance()
        assert (federation.number, federation.phase) == (1, "open")
        assert federation.task("ann").train
    expected = run_round(updates, bundle.file("weights.safetensors"), tmp_path / "expected.safetensors")
    assert round_path(tmp_path / "server" / "weights", 1).read_bytes() == expected.output.read_bytes()
    result = RoundFolder(tmp_path / "server" / "rounds" / "0").result
    assert result is not None
    assert [each["client"] for each in result["accepted"]] == ["ann", "ben"]
    assert result["stragglers"] == []


def test_an_update_counts_once(tmp_path: Path, bundle: Bundle) -> None:
    base = base_of(bundle)
    update = update_of(tmp_path / "sent", base, "ann")
    other = update_of(tmp_path / "others", base, "ann", examples=11)
    with federation_in(tmp_path / "server", bundle) as federation:
        join(federation, "ann", "ben")
        assert federation.task("ann").train
        assert take(federation, update, "ann")
        assert not take(federation, update, "ann")
        with pytest.raises(RefusedError, match="one of each device in a round, found another one"):
            take(federation, other, "ann")
        assert federation.round.count == 1
    with federation_in(tmp_path / "server", bundle) as federation:
        assert federation.round.count == 1
        assert not take(federation, update, "ann")
        assert federation.task("ben").train
        assert take(federation, update_of(tmp_path / "sent", base, "ben"), "ben")
        federation.close()
        federation.advance()
        assert not take(federation, update, "ann"), "known after its round"
        assert federation.round.count == 0


def test_updates_that_aggregate_would_refuse_are_refused(tmp_path: Path, bundle: Bundle) -> None:
    base = base_of(bundle)
    damaged = update_of(tmp_path / "sent", base, "ann")
    content = bytearray(damaged.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    damaged.write_bytes(content)
    forged = forge(tmp_path / "forged.update", base, client="ann", examples=-1)
    later = update_of(tmp_path / "later", base, "ann", round=7)
    with federation_in(tmp_path / "server", bundle) as federation:
        join(federation, "ann", "ben")
        for client in ("ann", "ben"):
            assert federation.task(client).train
        for update, status, text in (
            (damaged, 422, "expected content with the sum that its header states"),
            (forged, 422, "examples"),
            (later, 409, "round: expected 0, found 7"),
            (update_of(tmp_path / "sent", base, "ben"), 403, "of 'ann': .* found 'ben'"),
        ):
            with pytest.raises(RefusedError, match=text) as refused:
                take(federation, update, "ann")
            assert refused.value.status == status
            assert str(tmp_path) not in str(refused.value)
            assert federation.round.count == 0
        assert federation.devices.all[0].error is not None


def test_participants_are_drawn_and_stragglers_give_way(tmp_path: Path, bundle: Bundle, clock: list[float]) -> None:
    base = base_of(bundle)
    options = {"updates": 1, "participants": 2, "deadline": 60.0}
    with federation_in(tmp_path / "server", bundle, clock=lambda: clock[0], **options) as federation:
        join(federation, "ann", "ben", "cat", "dan")
        assert [federation.task(client).train for client in ("ann", "ben", "cat")] == [True, True, False]
        assert federation.task("cat").reason == "other devices were drawn for this round"
        with pytest.raises(RefusedError, match="a device that was drawn"):
            take(federation, update_of(tmp_path / "sent", base, "cat"), "cat")
    with federation_in(tmp_path / "server", bundle, clock=lambda: clock[0], **options) as federation:
        assert not federation.task("cat").train, "who was drawn is known after a restart"
        clock[0] += 61
        assert federation.task("cat").train, "after the deadline there is place"
        federation.task("ben")
        assert take(federation, update_of(tmp_path / "sent", base, "cat"), "cat")
        assert federation.seconds_left() == 0
        federation.close()
        federation.advance()
        result = RoundFolder(tmp_path / "server" / "rounds" / "0").result
        assert result is not None
        assert (result["stragglers"], result["asked"]) == (["ann", "ben"], 3)
        clients = ("ann", "ben", "cat", "dan")
        assert sum(federation.task(client).train for client in clients) == 2
        assert len(federation.round.asked & set(clients)) == 2


def test_a_deadline_closes_a_round_with_the_fewest_that_count(
    tmp_path: Path, bundle: Bundle, clock: list[float]
) -> None:
    base = base_of(bundle)
    few = AggregateConfig(min_updates=2)
    with federation_in(
        tmp_path / "server", bundle, aggregate=few, clock=lambda: clock[0], updates=5, deadline=10.0
    ) as federation:
        join(federation, "ann", "ben")
        for client in ("ann", "ben"):
            assert federation.task(client).train
        assert take(federation, update_of(tmp_path / "sent", base, "ann"), "ann")
        clock[0] += 20
        assert federation.seconds_left() is None
        with pytest.raises(RefusedError, match="at least 2 updates"):
            federation.close()
        assert take(federation, update_of(tmp_path / "sent", base, "ben"), "ben")
        assert federation.seconds_left() == 0
        clock[0] -= 15
        assert federation.seconds_left() == 5


def test_late_updates_count_where_they_may(tmp_path: Path, bundle: Bundle) -> None:
    base = base_of(bundle)
    late = update_of(tmp_path / "sent", base, "ben")
    for staleness in (0, 1):
        aggregate = AggregateConfig(max_staleness=staleness)
        server = tmp_path / f"server-{staleness}"
        with federation_in(server, bundle, aggregate=aggregate, updates=1) as federation:
            join(federation, "ann", "ben")
            for client in ("ann", "ben"):
                assert federation.task(client).train
            assert take(federation, update_of(tmp_path / "sent", base, "ann"), "ann")
            federation.close()
            federation.advance()
            if not staleness:
                with pytest.raises(RefusedError, match="round: expected 1, found 0") as refused:
                    take(federation, late, "ben")
                assert refused.value.status == 409
                continue
            assert take(federation, late, "ben")
            federation.close()
            federation.advance()
            assert federation.number == 2


def test_a_federation_ends_and_pauses(tmp_path: Path, bundle: Bundle) -> None:
    base = base_of(bundle)
    with federation_in(tmp_path / "server", bundle, updates=1, rounds=1) as federation:
        join(federation, "ann")
        federation.pause(True)
        task = federation.task("ann")
        assert (task.train, task.phase) == (False, "paused")
        federation.pause(False)
        assert federation.task("ann").train
        federation.pause(True)
        assert take(federation, update_of(tmp_path / "sent", base, "ann"), "ann"), "updates under way are taken"
        assert federation.seconds_left() is None
        federation.pause(False)
        federation.close()
        federation.advance()
        assert federation.task("ann").phase == "finished"
        with pytest.raises(RefusedError, match="finished"):
            take(federation, update_of(tmp_path / "more", base, "ann", examples=3), "ann")


def test_what_can_not_be_aggregated_halts_until_it_is_resumed(tmp_path: Path, bundle: Bundle) -> None:
    base = base_of(bundle)
    server = tmp_path / "server"
    with federation_in(server, bundle, updates=1) as federation:
        join(federation, "ann")
        assert federation.task("ann").train
        assert take(federation, update_of(tmp_path / "sent", base, "ann"), "ann")
        federation.close()
        (server / "weights").rmdir()
        (server / "weights").touch()
        federation.advance()
        assert federation.error is not None
        federation.advance()
        assert federation.number == 0
        (server / "weights").unlink()
        (server / "weights").mkdir()
        federation.pause(False)
        federation.advance()
        assert (federation.number, federation.error) == (1, None)


def test_old_updates_and_changes_are_removed(tmp_path: Path, bundle: Bundle) -> None:
    server = tmp_path / "server"
    aggregate = AggregateConfig(downlink_codec="int8")
    with federation_in(server, bundle, aggregate=aggregate, updates=1, keep_rounds=2) as federation:
        join(federation, "ann")
        weights = base_of(bundle)
        for number in range(5):
            assert federation.task("ann").train
            assert take(federation, update_of(tmp_path / "sent", weights, "ann"), "ann")
            federation.close()
            federation.advance()
            weights = read_weights(round_path(server / "weights", number + 1))
        task = federation.task("ann")
    kept = [number for number in range(5) if (server / "rounds" / str(number) / "updates").exists()]
    assert kept == [3, 4]
    assert sorted(path.stem for path in (server / "changes").iterdir()) == ["round-3", "round-4", "round-5"]
    assert task.base == weights.base
    assert all((server / "rounds" / str(number) / "result.json").exists() for number in range(5))


def test_a_folder_is_of_one_server_and_one_bundle(tmp_path: Path, bundle: Bundle) -> None:
    foreign = make_bundle(tmp_path / "foreign", personal=False, seed=1)
    with federation_in(tmp_path / "server", bundle), pytest.raises(BusyError), open_folder(tmp_path / "server", bundle):
        pass
    with pytest.raises(WrongBundleError, match="state of bundle"), open_folder(tmp_path / "server", foreign):
        pass
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(InputError, match="an empty folder"), open_folder(tmp_path / "photos", bundle):
        pass


CLIENTS = ("ann", "ben")


def live(folder: Path) -> int:
    """A server's life: devices join and send, as often as it takes, and the round ends; what was answered is noted."""
    bundle = open_bundle(folder / "bundle")
    with federation_in(folder / "here" / "server", bundle, updates=2) as federation:
        for client in CLIENTS:
            federation.devices.join(client, "proof", now=0)
            if federation.number == 0 and federation.phase == "open":
                federation.task(client)
                arrived = folder / "here" / f"{client}.arrived"
                shutil.copy(folder / "sent" / f"{client}-0.update", arrived)
                federation.take(arrived, client)
                (folder / "answered" / client).touch()
        if federation.seconds_left() == 0:
            federation.close()
        federation.advance()
        record_in(federation, rounds=1).catch_up(federation.number, len(federation.devices))
        return 0 if federation.error is None and federation.number == 1 else 1


@pytest.mark.slow
@pytest.mark.skipif(not can_watch(), reason="needs seccomp user notifications, which Linux has since 5.5")
def test_killed_in_any_write_no_update_is_lost_or_counts_twice(tmp_path: Path, bundle: Bundle) -> None:
    for client in CLIENTS:
        update_of(tmp_path / "sent", base_of(bundle), client)
    here, answered = tmp_path / "here", tmp_path / "answered"

    def begin() -> None:
        for folder in (here, answered):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def run(fault: Fault | None = None) -> int | None:
        return run_watched(partial(live, tmp_path), here, fault).code

    begin()
    first = run_watched(partial(live, tmp_path), here, None)
    assert first.code == 0, first.err
    expected = round_path(here / "server" / "weights", 1).read_bytes()
    for at in range(0, len(first.calls), 2):
        begin()
        assert run(Fault(at, KILL, False)) is None
        told = {path.name for path in answered.iterdir()}
        found = len(list((here / "server" / "rounds" / "0" / "updates").glob("*-*"))) if told else 0
        assert found >= len(told), f"lost, killed in call {at}"
        assert run() == 0, f"killed in call {at}, {first.calls[at]}"
        result = RoundFolder(here / "server" / "rounds" / "0").result
        assert result is not None
        assert [each["client"] for each in result["accepted"]] == list(CLIENTS)
        assert round_path(here / "server" / "weights", 1).read_bytes() == expected
        lines = (here / "server" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["event"] for line in lines] == ["arm", "round", "done"]


def test_a_damaged_journal_is_refused_by_name(tmp_path: Path, bundle: Bundle) -> None:
    with federation_in(tmp_path / "server", bundle) as federation:
        join(federation, "ann")
    journal = tmp_path / "server" / "devices.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"client": "be')
    with federation_in(tmp_path / "server", bundle) as federation:
        assert [device.client for device in federation.devices.all] == ["ann"]
        join(federation, "ben")
    with federation_in(tmp_path / "server", bundle) as federation:
        assert [device.client for device in federation.devices.all] == ["ann", "ben"]
    journal.write_text("{}\n")
    with pytest.raises(FedparaError, match=r"devices.jsonl: line 1"), federation_in(tmp_path / "server", bundle):
        pass
