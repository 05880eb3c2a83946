"""Phones sign: one that is not on the server's list waits and says why, one that is counts, another key is refused."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import served
from emulated_phone import SETTINGS, Phone
from served import Served

from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.serving.guarding import Demands
from fedpara_edge.serving.rounds import RoundFolder
from fedpara_edge.trust.keys import parse_public

RUN = "winter"
LINES = re.compile(r'\[clients\.([0-9a-f]{16})\]\nkey = "(ed25519:[0-9a-f]{64})"')
IN_STORE = """(async () => {
  const database = await new Promise((resolve) => {
    const request = indexedDB.open('fedpara-edge');
    request.onsuccess = () => resolve(request.result);
  });
  const ask = (mode, f) => new Promise((resolve) => {
    const request = f(database.transaction('keys', mode).objectStore('keys'));
    request.onsuccess = () => resolve(request.result);
  });
  %s
})()"""
"""Script with the store of the phone's key at hand."""
EXPORT = (
    IN_STORE
    % """
  const { privateKey } = await ask('readonly', (store) => store.get('own'));
  return crypto.subtle.exportKey('pkcs8', privateKey).then(() => 'read', (error) => error.name);"""
)
REPLACE = (
    IN_STORE
    % """
  const pair = await crypto.subtle.generateKey('Ed25519', false, ['sign', 'verify']);
  await ask('readwrite', (store) => store.put(pair, 'own'));
  database.close();"""
)
TRAIN = (("tap", "start"), ("until", "done"))


@pytest.fixture
def allow(tmp_path: Path) -> Path:
    """A list of clients with nobody on it."""
    path = tmp_path / "clients.toml"
    path.write_text(f'run = "{RUN}"\n[clients]\n', encoding="utf-8")
    return path


@pytest.fixture
def server(page: Path, bundle: Bundle, allow: Path, tmp_path: Path) -> Iterator[Served]:
    demands = Demands(allow=allow)
    with served.serving(
        tmp_path / "server", bundle, settings=SETTINGS, page=page, demands=demands, updates=1, rounds=2
    ) as started:
        yield started


def link_of(server: Served) -> str:
    return f"{server.url}#join={server.link.token}"


def with_worker(page: Path, folder: Path, script: str) -> Path:
    """The page, whose worker runs a script first."""
    changed = folder / "changed"
    shutil.copytree(page, changed)
    for compressed in changed.glob("worker.js.*"):
        compressed.unlink()
    worker = changed / "worker.js"
    worker.write_text(script + worker.read_text(encoding="utf-8"), encoding="utf-8")
    return changed


def test_a_phone_counts_once_it_is_on_the_list_and_with_its_key_alone(
    phone: Callable[..., Phone], server: Served, allow: Path, tmp_path: Path
) -> None:
    device, waits = phone("new"), tmp_path / "waits"
    told = device.do_alone(
        *(("open", link_of(server)), ("until", "waiting"), ("read", "model"), ("read", "lines"), ("ask", EXPORT)),
        *(("restart", None), ("open", server.url), ("until", "waiting"), ("read", "lines")),
    )
    assert "This phone is not on the list of participants yet." in told.read[0]
    lines = told.read[1]
    assert told.read[2] == "InvalidAccessError", "no script reads the private half"
    assert told.read[3] == lines, "name and key stay"
    found = LINES.fullmatch(lines)
    assert found is not None
    client, key = found.groups()
    assert [each.client for each in server.running.federation.devices.all] == [client]

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(
            device.do_alone, ("open", server.url), ("until", "waiting"), ("pick", str(device.data)),
            ("untilText", ["count", "29 examples"]), ("signal", str(waits)), ("until", "ready"), *TRAIN,
            ("tap", "send"), ("untilText", ["sum", "1 update"]),
        )  # fmt: skip
        until = time.monotonic() + 120
        while not waits.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        with allow.open("a", encoding="utf-8") as file:
            file.write(f"{lines}\n")
        acting.result()
    server.wait_for_round(1)
    first = RoundFolder(tmp_path / "server" / "rounds" / "0").result
    assert first is not None
    assert [update["client"] for update in first["accepted"]] == [client]
    (envelope,) = (tmp_path / "server" / "rounds" / "0" / "updates").glob("*.dsse")
    (signature,) = json.loads(envelope.read_text(encoding="utf-8"))["signatures"]
    assert signature["keyid"] == parse_public(key).keyid

    told = device.do_alone(
        *(("open", server.url), ("until", "ready"), ("ask", REPLACE), ("open", server.url), ("until", "ready"), *TRAIN),
        *(
            ("tap", "send"),
            ("untilText", ["error", "did not accept the update"]),
            ("until", "ready"),
            ("read", "detail"),
        ),
        *(("read", "count"), ("read", "lines")),
    )
    _, detail, count, other = told.read
    assert "expected a signature by one key of the list of clients, found 0 of 1" in detail
    assert count == "29 examples on this phone"
    found = LINES.fullmatch(other)
    assert found is not None
    assert (found[1], found[2] == key) == (client, False)
    round_ = server.running.federation.round
    assert (round_.count, [refusal.code for refusal in round_.refused]) == (0, ["unknown_client"])


def test_name_and_key_go_with_all_else_that_is_deleted(phone: Callable[..., Phone], server: Served) -> None:
    identity = ("open", link_of(server)), ("until", "waiting"), ("read", "lines")
    deleted = ("tap", "clear"), ("untilText", ["persistence", "deleted"]), ("restart", None)
    (one, other) = phone("leaving").do_alone(*identity, *deleted, *identity).read
    names, keys = zip(*(found.groups() for found in map(LINES.fullmatch, (one, other)) if found), strict=True)
    assert len({*names}) == len({*keys}) == 2


def test_a_phone_that_opens_the_link_in_two_tabs_at_once_joins_once(
    phone: Callable[..., Phone], page: Path, bundle: Bundle, tmp_path: Path
) -> None:
    slow = "const open = FileSystemFileHandle.prototype.createSyncAccessHandle;\n" + (
        "FileSystemFileHandle.prototype.createSyncAccessHandle = async function () "
        "{ await new Promise((go) => setTimeout(go, 5000)); return open.call(this); };\n"
    )
    with served.serving(tmp_path / "server", bundle, page=with_worker(page, tmp_path, slow)) as server:
        link = ("open", link_of(server))
        phone("twice").do_alone(link, ("tab", None), link, ("until", "ready"), ("turn", 0), ("until", "ready"))
        assert len(server.running.federation.devices.all) == 1


def test_a_browser_that_can_not_sign_is_told_so(
    phone: Callable[..., Phone], page: Path, bundle: Bundle, allow: Path, tmp_path: Path
) -> None:
    lacking = "crypto.subtle.generateKey = async () => { throw new DOMException('no', 'NotSupportedError'); };\n"
    old = with_worker(page, tmp_path, lacking)
    with served.serving(tmp_path / "server", bundle, page=old, demands=Demands(allow=allow)) as server:
        told = phone("old").do_alone(("open", link_of(server)), ("untilError", None), ("read", "error"))
    assert told.read == [
        "The server accepts only signed updates, and this browser cannot sign. Update it, or use Chrome 137, Safari "
        "17, Firefox 129 or newer."
    ]
