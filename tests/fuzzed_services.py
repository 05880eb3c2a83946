"""Files and messages of servers, agents and fleets, and what reads them; for `fuzzed.py`."""

from __future__ import annotations

import shutil
from contextlib import suppress
from json import dumps
from pathlib import Path

from mutations import Made
from served import bundle_in, federation_in, update_of
from small_round import send, start_round

from device_runtime.agent.connection import Connection
from device_runtime.agent.member import Member
from device_runtime.agent.transfers import read_location
from fedpara_edge.fleet.app import read_app
from fedpara_edge.fleet.federation import NODES as DEVICES
from fedpara_edge.fleet.federation import read_rounds
from fedpara_edge.fleet.messages import Call, read_call
from fedpara_edge.fleet.settings import FleetConfig, to_flower
from fedpara_edge.formats.task import read_task
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.hub.download import read_names
from fedpara_edge.serving.devices import Devices
from fedpara_edge.serving.folder import open_folder
from fedpara_edge.serving.invitation import keep_address, read_address
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.serving.requests import read_join
from fedpara_edge.serving.rounds import RoundFolder
from fedpara_edge.serving.uploads import Uploads
from fedpara_edge.storage.atomic import sha256_of
from fedpara_edge.storage.tomlfile import toml_text


def tasks(folder: Path) -> Made:
    with federation_in(folder / "server", bundle_in(folder)) as federation:
        (folder / "task.json").write_text(dumps(federation.task("ann").to_json()))

    def read(path: Path) -> None:
        task = read_task(path.read_bytes(), source="here")
        assert task.changes_from(task.base) == []

    return [folder / "task.json"], read


def serving(folder: Path) -> Made:
    bundle, server = bundle_in(folder), folder / "server"
    with federation_in(server, bundle, updates=1) as federation:
        federation.devices.join("ann", "proof", now=0)
        federation.task("ann")
        federation.note_sent(860)
        (folder / "garbage").write_bytes(b"garbage")
        with suppress(RefusedError):
            federation.take(folder / "garbage", "ann")
        update = update_of(folder / "sent", read_weights(bundle.file("weights.safetensors")), "ann")
        federation.take(update, "ann")
        federation.close()
        federation.advance()

    def read(path: Path) -> None:
        if path.name == "run.json":
            with open_folder(server, bundle):
                pass
        elif path.name == "devices.jsonl":
            assert all(isinstance(device.client, str) for device in Devices(path).all)
        else:
            found = RoundFolder(path.parent)
            assert found.result is not None or not path.exists()
            assert all(path.parent == found.path / "updates" for path in found.closed or ())

    names = ("opened.json", "asked.jsonl", "refused.jsonl", "sent.jsonl", "closed.json", "result.json")
    records = [server / "rounds" / "0" / name for name in names]
    return [server / "run.json", server / "devices.jsonl", *records], read


def uploads(folder: Path) -> Made:
    (folder / "uploads").mkdir()
    upload = Uploads(folder / "uploads", max_bytes=100).begin("ann", 9)
    saved = folder / "upload.json"
    shutil.copy(upload.folder / saved.name, saved)

    def read(path: Path) -> None:
        upload.folder.mkdir(exist_ok=True)
        upload.content.touch()
        shutil.copy(path, upload.folder / path.name)
        Uploads(folder / "uploads", max_bytes=100)

    return [saved], read


def addresses(folder: Path) -> Made:
    keep_address(folder, "https://pi.local/", None)
    return [folder / "address.json"], lambda path: read_address(path.parent).link("token")


def joining(folder: Path) -> Made:
    (folder / "join").write_text(dumps({"client": "ann", "secret": "s" * 32}))
    return [folder / "join"], lambda path: read_join(path.read_bytes())


def members(folder: Path) -> Made:
    connection = Connection("http://localhost:1/")
    kept = {"url": connection.url, "client": "ann", "secret": "s" * 32, "token": "t"}
    (folder / "member.json").write_text(dumps(kept))
    return [folder / "member.json"], lambda _: Member(folder, connection)


def sending(folder: Path) -> Made:
    update = send(folder, start_round(folder), "ann")
    note = update.with_name(f"{update.name}.json")
    note.write_text(dumps({"sha256": sha256_of(update), "location": "/updates/x"}))

    return [note], lambda path: read_location(path, sha256_of(update))


def hub_listings(folder: Path) -> Made:
    (folder / "listing").write_text(dumps({"id": "ann/digits", "siblings": [{"rfilename": "manifest.json"}] * 2}))

    def read(path: Path) -> None:
        assert all(isinstance(name, str) for name in read_names(path.read_bytes(), "ann/digits"))

    return [folder / "listing"], read


def fleet_apps(folder: Path) -> Made:
    plan = folder / "plan.toml"
    config = FleetConfig(bundle=folder / "bundle", plan=plan, run=folder / "run", arm="small", round_seconds=9.5)
    text = toml_text({"tool": {"flwr": {"app": {"config": to_flower(config)}}}})
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return [folder / "pyproject.toml"], lambda path: read_app(path.parent)


def fleet_calls(folder: Path) -> Made:
    (folder / "options.json").write_text(dumps({"lr": 0.1, "epochs": 2, "codec": "int8", "seed": 3}))
    call = Call(fingerprint="f", round=2, base="b", options={})

    def read(path: Path) -> None:
        content = call.content()
        content.config_records["message"]["options"] = path.read_bytes().decode("utf-8", "replace")
        assert isinstance(read_call(content).options, dict)

    return [folder / "options.json"], read


def fleet_devices(folder: Path) -> Made:
    (folder / DEVICES).write_text(dumps({"1234567890123456789": 3, "5": 0}))

    def read(path: Path) -> None:
        held = read_rounds(path)
        assert all(type(node) is type(round) is int for node, round in held.items())

    return [folder / DEVICES], read
