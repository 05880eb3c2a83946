"""The operator's page in a real browser: it shows what happens as it happens, and pauses and closes rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import served
from phone_tools import PHONE, node, run_program
from served import Served, base_of, bundle_in, update_of

from device_runtime.agent.transfers import send
from fedpara_edge.formats.weights import read_weights

DESKTOP = {"viewport": {"width": 1280, "height": 900}, "colorScheme": "light"}
PHONE_SIZED = {"viewport": {"width": 360, "height": 740}, "colorScheme": "dark", "isMobile": True, "hasTouch": True}


class Browser:
    """A browser, which is told one thing after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, action: str, argument: Any = None) -> Any:
        """Do something; what it told, if anything."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([action, argument]) + "\n")
        self._process.stdin.flush()
        told = None
        while (line := self._process.stdout.readline()) != json.dumps(f"{action} done") + "\n":
            assert line, f"{action} {argument}: the browser ended"
            told = json.loads(line)
        return told


@contextmanager
def browsing(**options: Any) -> Iterator[Browser]:
    command = [node(), str(PHONE / "operator.mjs"), run_program("sh", PHONE / "browser.sh").strip()]
    with subprocess.Popen(
        [*command, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    ) as process:
        try:
            yield Browser(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with served.serving(tmp_path / "server", bundle_in(tmp_path), updates=3, rounds=4) as server:
        yield server


def link_of(server: Served) -> str:
    return f"{server.url}operator#operator={server.running.tokens.make('operator')}"


def take_part(server: Served, folder: Path, *clients: str) -> None:
    """Clients join and send an update of the round that is open."""
    for client in clients:
        member = server.member(folder / client, client)
        task = member.task(wait=False)
        assert task.train
        base = base_of(server.running.federation.bundle)
        if task.round:
            member.receive(task, member.bundle(task))
            base = read_weights(member.weights)
        send(member.connection, "updates", update_of(folder / f"sent-{client}", base, client))


def test_the_page_shows_rounds_as_they_happen_and_closes_and_pauses_them(server: Served, tmp_path: Path) -> None:
    with browsing(**DESKTOP) as browser:
        browser.do("open", link_of(server))
        assert browser.do("until", "Round 1 of 4 is open: 0 of 3 updates, 0 devices asked.")
        take_part(server, tmp_path, "ann", "<i>ben")
        assert browser.do("until", "2 of 3 updates, 2 devices asked")
        assert "<i>ben\tsent" in browser.do("read", "#devices")
        (tmp_path / "garbage").write_bytes(b"garbage")
        cat = server.member(tmp_path / "cat", "cat")
        assert cat.task(wait=False).train
        assert cat.connection.request("POST", "updates", body=b"garbage").status == 422
        assert browser.do("until", "update of 'cat': expected").endswith("\n") is False
        for key in ("tabTo", "press"):
            browser.do(key, {"tabTo": "close", "press": "Enter"}[key])
        assert browser.do("read", "#question").startswith("Close round 1 with 2 of 3 updates?")
        browser.do("press", "Escape")
        assert server.running.federation.number == 0, "not without confirmation"
        for action, argument in (("tabTo", "close"), ("press", "Enter"), ("tabTo", "yes"), ("press", "Enter")):
            browser.do(action, argument)
        assert browser.do("until", "Round 2 of 4 is open")
        assert server.running.federation.number == 1
        for _ in range(2):
            browser.do("tabTo", "pause")
            browser.do("press", "Enter")
            assert browser.do("until", "Round 2 of 4 is paused")
            assert server.running.federation.phase == "paused"
            browser.do("press", "Enter")  # the focus is on what goes on
            assert browser.do("until", "Round 2 of 4 is open")
        take_part(server, tmp_path, "ann", "<i>ben", "dan")
        assert browser.do("until", "Round 3 of 4 is open")
        rows = browser.do("read", "#rounds").splitlines()
        assert [row.split("\t")[0] for row in rows] == ["2", "1"]
        _draw(browser, "operator-light")
        names = browser.do("names")
        for named in ('button "Pause"', 'progressbar "Updates of this round"', 'region "Rounds"', 'img "Training loss'):
            assert named in names, names
        assert browser.do("overflow") <= 0
    with browsing(**PHONE_SIZED) as browser:
        browser.do("open", link_of(server))
        assert browser.do("until", "Round 3 of 4 is open")
        assert browser.do("overflow") <= 0
        _draw(browser, "operator-dark-360")


def test_the_page_has_nothing_for_others(server: Served, tmp_path: Path) -> None:
    member = server.member(tmp_path / "ann", "ann")
    for token in ("", str(server.link.token), str(member.connection.token)):
        with browsing(**DESKTOP) as browser:
            browser.do("open", f"{server.url}operator#operator={token}")
            assert browser.do("until", "needs the operator’s link")
            assert browser.do("read", "#devices") == ""
            assert "disabled" in browser.do("names")


def test_the_page_finds_a_server_again(tmp_path: Path) -> None:
    bundle = bundle_in(tmp_path)
    with browsing(**DESKTOP) as browser:
        with served.serving(tmp_path / "server", bundle, updates=1) as server:
            browser.do("open", link_of(server))
            assert browser.do("until", "Round 1 is open")
            port = server.running.port
        assert browser.do("until", "No connection to the server")
        with served.serving(tmp_path / "server", bundle, port=port, updates=1) as server:
            take_part(server, tmp_path, "ann")
            assert browser.do("until", "Round 2 is open")


def _draw(browser: Browser, name: str) -> None:
    """Keep a picture of the page where the environment asks for them."""
    if (folder := os.environ.get("SCREENSHOTS")) is not None:
        browser.do("draw", str(Path(folder) / f"{name}.png"))
