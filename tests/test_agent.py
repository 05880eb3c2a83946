"""The agent: from the join link to the updates of every round, whatever fails meanwhile, and its conditions."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from phone_site import Site
from phone_site import serving as site_of
from served import bundle_in, federation_in, serving
from softmax_regression import SoftmaxRegression, write_npz

from device_runtime import tuning
from device_runtime.agent import agent, conditions
from device_runtime.agent.agent import AgentConfig, AgentResult, run_agent
from device_runtime.agent.conditions import Conditions
from device_runtime.agent.connection import Connection, UnreachableError
from device_runtime.agent.link import JoinLink, read_link
from device_runtime.agent.member import Member, NotJoinedError
from device_runtime.agent.patience import Patience
from device_runtime.config import TrainConfig
from device_runtime.sources import Reading
from device_runtime.training import train
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.errors import BusyError, FedparaError, InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.task import read_task
from fedpara_edge.storage.locking import hold_folder
from fedpara_edge.storage.rounds import round_path

Events = list[tuple[str, Mapping[str, Any]]]


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_engine(bundle: Bundle, *_: Any, **__: Any) -> SoftmaxRegression:
        return SoftmaxRegression(bundle)

    monkeypatch.setattr(tuning, "open_engine", open_engine)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_in(tmp_path)


def take_part(
    link: JoinLink, folder: Path, client: str, *, events: Events | None = None, seed: int = 0, **config: Any
) -> AgentResult:
    """An agent's whole life."""
    data = folder / f"{client}.npz"
    if not data.exists():
        write_npz(data, seed=seed)

    def hear(name: str, **fields: Any) -> None:
        if events is not None:
            events.append((name, fields))

    options = AgentConfig(**{"patience": 30.0, **config})
    return run_agent(link, data, folder / client, options, reading=Reading(), client=client, own={}, on_event=hear)


class Thread(threading.Thread):
    """A thread with a result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self._function, self._result, self._error = function, None, None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # noqa: BLE001  (raised again by whom it concerns)
            self._error = error  # type: ignore[assignment]

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._result


def test_two_agents_and_a_server_do_what_the_commands_do(tmp_path: Path, bundle: Bundle) -> None:
    settings = {"lr": 0.1, "batch_size": 8, "seed": 3}
    aggregate = AggregateConfig(algorithm="fedavgm:momentum=0.5", downlink_codec="float32")
    names = ("ann", "ben")
    with serving(tmp_path / "server", bundle, aggregate=aggregate, settings=settings, updates=2, rounds=3) as served:
        threads = [
            Thread(lambda name=name, seed=seed: take_part(served.link, tmp_path, name, seed=seed))  # type: ignore[misc]
            for seed, name in enumerate(names)
        ]
        results = [thread.result() for thread in threads]
    assert [result.rounds for result in results] == [(0, 1, 2)] * 2
    changes = sum((tmp_path / "server" / "changes" / f"round-{number}.safetensors").stat().st_size for number in (1, 2))
    in_bundle = sum(path.stat().st_size for path in bundle.path.iterdir())
    assert results[0].received_bytes <= in_bundle + changes, "the initial weights once, and changes where smaller"
    weights = bundle.file("weights.safetensors")
    for number in range(3):
        updates = []
        for name in names:
            update = tmp_path / f"{name}-{number}.safetensors"
            data = agent.open_data(tmp_path / f"{name}.npz", bundle.manifest)
            state = tmp_path / f"by-hand-{name}"
            train(
                SoftmaxRegression(bundle),
                data,
                weights,
                TrainConfig(**settings),
                output=update,
                state=state,
                client=name,
            )
            updates.append(update)
        output = tmp_path / f"by-hand-{number + 1}.safetensors"
        run_round(
            updates, weights, output, aggregate, state=tmp_path / "by-hand-server", change=tmp_path / f"change-{number}"
        )
        weights = output
        assert round_path(tmp_path / "server" / "weights", number + 1).read_bytes() == output.read_bytes()


def test_a_server_that_is_gone_and_back_finds_the_agent_again(tmp_path: Path, bundle: Bundle) -> None:
    events: Events = []
    with serving(tmp_path / "server", bundle, updates=1, rounds=3) as served:
        link, port = served.link, served.running.port
        first = take_part(link, tmp_path, "ann", rounds=1)
    assert first.rounds == (0,)
    thread = Thread(lambda: take_part(link, tmp_path, "ann", events=events))
    _wait_until(lambda: any(name == "unreachable" for name, _ in events))
    with serving(tmp_path / "server", bundle, port=port, updates=1, rounds=3):
        assert thread.result().rounds == (1, 2)


def _wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_an_update_that_was_not_sent_is_sent_first(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "server", bundle, updates=1, rounds=2) as served:
        with monkeypatch.context() as patched:

            def power_cut(*_: Any) -> None:
                raise SystemExit

            patched.setattr(agent, "send", power_cut)
            with pytest.raises(SystemExit):
                take_part(served.link, tmp_path, "ann")
        waiting = tmp_path / "ann" / "update.safetensors"
        assert waiting.exists()
        events: Events = []
        assert take_part(served.link, tmp_path, "ann", events=events).rounds == (0, 1)
        trained = [fields["round"] for name, fields in events if name == "training_finished"]
        assert trained == [1], "the first is not trained again"
        assert not waiting.exists()


def test_an_update_that_came_too_late_is_dropped(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "server", bundle, updates=1, rounds=2) as served:
        sending = agent.send
        with monkeypatch.context() as patched:

            def overtaken(*given: Any) -> Any:
                patched.setattr(agent, "send", sending)
                assert take_part(served.link, tmp_path, "ben", rounds=1).rounds == (0,)
                served.wait_for_round(1)
                return sending(*given)

            patched.setattr(agent, "send", overtaken)
            result = take_part(served.link, tmp_path, "ann")
    assert (result.rounds, result.refused) == ((1,), 1)


def test_a_training_goes_on_where_it_was_killed(tmp_path: Path, bundle: Bundle) -> None:
    with serving(tmp_path / "server", bundle, settings={"batch_size": 4}, updates=1, rounds=1) as served:
        write_npz(tmp_path / "ann.npz")

        def stop_at(step: int, steps: int, loss: float) -> None:  # noqa: ARG001
            if step == 4:
                raise SystemExit

        given: dict[str, Any] = {"reading": Reading(), "client": "ann", "own": {"save_steps": 1}}
        events: Events = []
        config = AgentConfig(patience=30.0)
        with pytest.raises(SystemExit):
            run_agent(
                served.link, tmp_path / "ann.npz", tmp_path / "ann", config,
                on_event=lambda *_, **__: None, on_step=stop_at, **given,
            )  # fmt: skip
        run_agent(
            served.link, tmp_path / "ann.npz", tmp_path / "ann", config,
            on_event=lambda name, **fields: events.append((name, fields)), **given,
        )  # fmt: skip
    resumed = [fields["resumed_from_step"] for name, fields in events if name == "training_finished"]
    assert resumed == [3]


def test_an_agent_tunes_in_its_own_folder(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_cores", lambda: 2)
    events: Events = []
    with serving(tmp_path / "server", bundle, settings={"batch_size": 4}, updates=1, rounds=2) as served:
        write_npz(tmp_path / "ann.npz")
        result = run_agent(
            served.link, tmp_path / "ann.npz", tmp_path / "ann", AgentConfig(patience=30.0),
            on_event=lambda name, **fields: events.append((name, fields)),
            reading=Reading(), client="ann", own={"tune": True},
        )  # fmt: skip
    assert result.rounds == (0, 1)
    (kept,) = (tmp_path / "ann").rglob(tuning.FILE)
    assert json.loads(kept.read_text(encoding="utf-8"))["of"]["rows"] == 4
    (told,) = (fields for name, fields in events if name == "tuned")
    assert str(told["message"]).startswith("tuned: ")


def test_who_is_not_let_in_is_told(tmp_path: Path, bundle: Bundle) -> None:
    with serving(tmp_path / "server", bundle, updates=1, rounds=1) as served:
        for token, text in ((None, "join link with join="), ("guess", "ask for a new join link")):
            with pytest.raises(FedparaError, match=text):
                take_part(JoinLink(url=served.url, token=token), tmp_path, "ann")
        take_part(served.link, tmp_path, "ann")
        (tmp_path / "ben").mkdir()
        with pytest.raises(InputError, match="no other device has, found 'ann'"):
            Member(tmp_path / "ben", Connection(served.url)).join(served.link, "ann")
        with pytest.raises(InputError, match="expected 'ann', under which this device joined"):
            Member(tmp_path / "ann", Connection(served.url)).join(served.link, "cat")
        with pytest.raises(InputError, match="expected a device of"):
            Member(tmp_path / "ann", Connection("http://localhost:1/"))
        (tmp_path / "server" / "devices.jsonl").unlink()
    with serving(tmp_path / "server", bundle, port=served.running.port, updates=1), pytest.raises(NotJoinedError):
        Member(tmp_path / "ann", Connection(served.url)).task(wait=False)
    assert (tmp_path / "ann" / "member.json").stat().st_mode & 0o077 == 0


def test_a_folder_is_of_one_agent(tmp_path: Path, bundle: Bundle) -> None:
    with serving(tmp_path / "server", bundle, updates=2) as served:
        thread = Thread(lambda: take_part(served.link, tmp_path, "ann", rounds=1))
        _wait_until(lambda: served.running.federation.round.count == 1)
        thread.result()
        with hold_folder(tmp_path / "ann", kind="a folder", lock="lock"), pytest.raises(BusyError):
            take_part(served.link, tmp_path, "ann")


def test_patience_ends(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="expected an answer, found Connection refused"):
        take_part(JoinLink(url="http://127.0.0.1:9/", token="x"), tmp_path, "ann", patience=0.1)


def test_waits_grow_and_obey_the_server() -> None:
    waits: list[float] = []
    answers: list[float | None] = [None] * 12 + [7.0]

    def attempt() -> str:
        if answers:
            raise UnreachableError("away", after_seconds=answers.pop(0))
        return "done"

    patience = Patience(seconds=None, tell=lambda *_, **__: None, sleep=waits.append)
    assert patience(attempt) == "done"
    assert all(0.5 <= wait <= min(2.0**number, 300) for number, wait in enumerate(waits[:12]))
    assert max(waits[6:12]) > max(waits[:2])
    assert 7 <= waits[12] <= 8


def test_a_server_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    site = Site(tmp_path)
    site.files["/task.json"] = json.dumps({"bundle": "bundle"}).encode()
    with site_of(site):
        with pytest.raises(FedparaError, match="expected a task of version 1"):
            Member(tmp_path / "ann", Connection(site.url)).task(wait=False)
        with pytest.raises(FedparaError, match="expected a server of `fedpara-edge serve`, found status"):
            Member(tmp_path / "ann", Connection(site.url)).join(JoinLink(url=site.url, token="x"), None)


@pytest.mark.parametrize("url", ["ftp://host/", "host:8080", "http://", "http://host:port/"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected an address such as"):
        Connection(url)


def test_a_link_has_its_parts() -> None:
    found = read_link(f"https://pi.local:8443/#join=a.b.c&ca={'0' * 64}")
    assert (found.url, found.token, found.ca) == ("https://pi.local:8443/", "a.b.c", "0" * 64)
    with pytest.raises(InputError, match="SHA-256 after ca="):
        read_link("https://pi.local/#join=x&ca=abc")


@pytest.mark.parametrize("field", ["round", "train", "phase", "bundle", "history", "settings"])
def test_a_task_with_a_field_of_another_type_is_refused(field: str, tmp_path: Path, bundle: Bundle) -> None:
    with federation_in(tmp_path / "server", bundle) as federation:
        task = federation.task("ann")
    content = task.to_json()
    assert read_task(json.dumps(content).encode(), source="here") == task
    with pytest.raises(FedparaError, match=f"here: expected a task of version 1, found {field}"):
        read_task(json.dumps({**content, field: 1.5}).encode(), source="here")


def machine(folder: Path, **files: str) -> Path:
    """A machine whose kernel tells this in its files, `__` in their names for a slash; `conditions.KERNEL`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return folder


POWER = "sys__class__power_supply__"
BATTERY = {f"{POWER}BAT0__type": "Battery", f"{POWER}BAT0__status": "Discharging"}


@pytest.mark.parametrize(
    ("files", "obstacle"),
    [
        ({}, None),
        (BATTERY, "on battery"),
        ({**BATTERY, f"{POWER}AC__type": "Mains", f"{POWER}AC__online": "0"}, "on battery"),
        ({**BATTERY, f"{POWER}AC__type": "Mains", f"{POWER}AC__online": "1"}, None),
        ({f"{POWER}BAT0__type": "Battery", f"{POWER}BAT0__status": "Full"}, None),
        ({f"{POWER}usb__type": "USB", f"{POWER}usb__online": "0"}, None),
    ],
    ids=["no battery", "battery", "unplugged", "plugged in", "full", "a board on USB"],
)
def test_mains_power(files: dict[str, str], obstacle: str | None, tmp_path: Path) -> None:
    kernel = machine(tmp_path / "kernel", **files)
    assert Conditions(mains=True).obstacle(kernel=kernel) == obstacle
    assert Conditions().obstacle(kernel=kernel) is None


def test_temperature_of_the_hottest_sensor(tmp_path: Path) -> None:
    zone = "sys__class__thermal__thermal_zone"
    kernel = machine(
        tmp_path / "kernel", **{f"{zone}0__temp": "41000", f"{zone}1__temp": "81500", f"{zone}2__temp": ""}
    )
    for is_training in (False, True):
        assert Conditions(max_celsius=80).obstacle(kernel=kernel, is_training=is_training) == "82 °C, above 80"
        assert Conditions(max_celsius=90).obstacle(kernel=kernel, is_training=is_training) is None
    assert Conditions(max_celsius=1).obstacle(kernel=machine(tmp_path / "nothing")) is None


def test_idle_is_a_load_that_others_make(tmp_path: Path) -> None:
    cores = os.cpu_count() or 1
    busy = machine(tmp_path / "busy", proc__loadavg=f"{0.9 * cores:.2f} 0.10 0.10 2/345 6789")
    assert Conditions(max_load=0.5).obstacle(kernel=busy) == "a load of 0.90 per core, above 0.5"
    assert Conditions(max_load=1.5).obstacle(kernel=busy) is None
    assert Conditions(max_load=0.5).obstacle(kernel=busy, is_training=True) is None, "the load is its own"
    assert Conditions(max_load=0.5).obstacle(kernel=machine(tmp_path / "nothing")) is None


def test_a_metered_link_is_that_of_the_default_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = machine(tmp_path / "kernel", proc__net__route="Iface\tDestination\nwlan0\t00000000\neth0\t0000A8C0")
    asked: list[str] = []

    def answering(answer: str) -> Callable[[str], str]:
        def ask(device: str) -> str:
            asked.append(device)
            return answer

        return ask

    for answer, obstacle in (("yes (guessed)", "a metered network"), ("no (guessed)", None), ("unknown", None)):
        monkeypatch.setattr(conditions, "_ask_network_manager", answering(answer))
        assert Conditions(unmetered=True).obstacle(kernel=kernel) == obstacle
        assert Conditions(unmetered=True).obstacle(kernel=kernel, is_training=True) is None, "nothing is sent meanwhile"
    assert asked == ["wlan0"] * 3
    assert Conditions(unmetered=True).obstacle(kernel=machine(tmp_path / "no route")) is None


def test_network_manager_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nmcli").write_text("#!/bin/sh\n[ \"$*\" = '-g GENERAL.METERED device show wlan0' ] && echo yes\n")
    (tmp_path / "nmcli").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert conditions._ask_network_manager("wlan0") == "yes"
    assert conditions._ask_network_manager("eth0") == ""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert conditions._ask_network_manager("wlan0") == "unknown"


def test_an_agent_waits_for_its_conditions(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    obstacles = ["on battery", "on battery", None]
    monkeypatch.setattr(agent, "CONDITION_SECONDS", 0.01)
    monkeypatch.setattr(
        AgentConfig, "obstacle", lambda _, **__: obstacles.pop(0) if len(obstacles) > 1 else obstacles[0]
    )
    events: Events = []
    with serving(tmp_path / "server", bundle, updates=1, rounds=1) as served:
        assert take_part(served.link, tmp_path, "ann", events=events, mains=True).rounds == (0,)
    names = [name for name, _ in events]
    assert names[:4] == ["joined", "waiting", "waiting", "training"]
