"""What goes wrong on phones is said in a plain sentence, and nothing is lost: connections, servers, memory, storage."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served
from emulated_phone import SETTINGS, Phone, ask, picking
from phone_site import Site
from small_net import without_verification

from export.build import make_bundle
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.serving.rounds import RoundFolder

DONE = (("tap", "start"), ("until", "done"))
FIRST_PIECE = 64 << 10


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose updates go in several pieces."""
    folder = tmp_path_factory.mktemp("large")
    with without_verification():
        return make_bundle(Recipe(name="mlp", engines=("onnxruntime",)), folder / "bundle").bundle


@pytest.fixture
def joined(tmp_path: Path) -> Callable[[served.Served], tuple[Phone, tuple[tuple[str, Any], ...]]]:
    """A phone with examples for that bundle, and what it does to train in the first round of a server."""

    def make(server: served.Served) -> tuple[Phone, tuple[tuple[str, Any], ...]]:
        random, data = np.random.default_rng(0), tmp_path / "phone.npz"
        np.savez(data, x=random.integers(0, 256, (20, 1, 28, 28), np.uint8), y=random.integers(0, 10, 20))
        link = f"{server.url}#join={server.link.token}"
        return Phone(tmp_path / "profile", data, server.url), (
            ("open", link),
            ("until", "ready"),
            ("pick", str(data)),
            *DONE,
        )

    return make


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("what", ["connection", "tab"])
def test_an_upload_that_broke_goes_on_where_it_stopped(
    what: str, page: Path, large: Bundle, joined: Any, tmp_path: Path
) -> None:
    """The connection breaks after the first piece, or the browser is killed then: what is there is not sent again."""
    again = {
        "connection": (("unblock", None),),
        "tab": (("unblock", None), ("restart", None), ("open", "{url}")),
    }[what]
    with served.serving(tmp_path / "server", large, page=page, updates=1, rounds=1) as server:
        device, begun = joined(server)
        go_on = [(name, server.url if argument == "{url}" else argument) for name, argument in again]
        told = device.do_alone(
            *(
                *begun,
                ("block", ["updates/*", "PATCH", 1]),
                ("tap", "send"),
                ("untilStatus", "No connection: 65.5 kB of "),
            ),
            *(*go_on, ("untilText", ["sum", "1 update"]), ("read", "contributions")),
        )
        result = RoundFolder(tmp_path / "server" / "rounds" / "0").result
    assert result is not None
    assert [update["examples"] for update in result["accepted"]] == [20]
    size = result["received_bytes"]
    assert told.read[0].startswith("Round 1, ")
    assert told.read[0].endswith("learned from 20 examples")
    pieces = [request["bytes"] for request in told.requests if request["method"] == "PATCH"]
    assert pieces[0] == FIRST_PIECE
    assert size - FIRST_PIECE in accumulate(reversed(pieces)), "of the rest alone"
    begun_at = [request["url"] for request in told.requests if request["url"].endswith("/updates")]
    assert len(begun_at) == 1, "to where it was sent before"


def test_a_server_that_is_gone_and_comes_back_gets_the_update(
    page: Path, large: Bundle, joined: Any, tmp_path: Path
) -> None:
    gone, back = tmp_path / "gone", tmp_path / "back"
    with ThreadPoolExecutor(1) as pool:
        with served.serving(tmp_path / "server", large, page=page, updates=1, rounds=1) as server:
            device, begun = joined(server)
            acting = pool.submit(
                device.do_alone,
                *(*begun, ("signal", f"{tmp_path / 'trained'}"), ("untilFile", f"{gone}"), ("tap", "send")),
                *(
                    ("untilStatus", "No connection: 0.0 kB of "),
                    ("signal", f"{back}"),
                    ("untilText", ["sum", "1 update"]),
                ),
                *(("untilModel", "finished"), ("read", "contributions")),
            )
            wait_for(tmp_path / "trained")
            port = server.running.port
        gone.touch()
        wait_for(back)
        with served.serving(tmp_path / "server", large, page=page, port=port, updates=1, rounds=1):
            told = acting.result()
    assert told.read[0].startswith("Round 1, ")


def test_a_phone_that_is_late_takes_part_in_the_next_round(
    page: Path, large: Bundle, joined: Any, tmp_path: Path
) -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        served.serving(tmp_path / "server", large, page=page, updates=1, rounds=2) as server,
    ):
        device, begun = joined(server)
        acting = pool.submit(
            device.do_alone,
            *(*begun, ("signal", f"{tmp_path / 'trained'}"), ("untilFile", f"{tmp_path / 'over'}"), ("tap", "send")),
            *(("untilText", ["error", "too late"]), ("read", "error"), ("untilModel", "round 2"), ("until", "ready")),
            *(*DONE, ("tap", "send"), ("untilModel", "finished"), ("read", "contributions")),
        )
        wait_for(tmp_path / "trained")
        native = served.update_of(tmp_path / "updates", read_weights(large.file(WEIGHTS), large), "native")
        server.member(tmp_path / "native", "native")
        server.running.federation.task("native")
        server.running.federation.take(native, "native")
        server.wait_for_round(1)
        (tmp_path / "over").touch()
        told = acting.result()
    assert told.read[0].startswith("The update came too late or was not asked for. Your examples are still here")
    assert told.read[1].startswith("Round 2, ")


def test_a_tab_beside_one_that_sends_neither_sends_nor_deletes_and_goes_on_after_it(
    page: Path, large: Bundle, joined: Any, tmp_path: Path
) -> None:
    with served.serving(tmp_path / "server", large, page=page, updates=1, rounds=1) as server:
        device, begun = joined(server)
        told = device.do_alone(
            *(
                *begun,
                ("block", ["updates/*", "PATCH", 1]),
                ("tap", "send"),
                ("untilStatus", "No connection: 65.5 kB of "),
            ),
            *(("tab", None), ("open", server.url), ("untilError", None), ("read", "error"), ("tap", "clear")),
            *(
                ("unblock", None),
                ("untilModel", "finished"),
                ("read", "contributions"),
                ("read", "count"),
                ("read", "error"),
            ),
        )
    assert told.read[0] == "This page is at work in another tab. Close one of the two."
    assert told.read[1].startswith("Round 1, ")
    assert told.read[2:] == ["20 examples on this phone", ""]


@pytest.mark.parametrize("what", ["hold", "block"])
def test_what_is_stored_is_deleted_while_the_phone_waits_for_a_round(
    what: str, page: Path, large: Bundle, joined: Any, tmp_path: Path
) -> None:
    """The server has not answered yet, or can't be reached; what it says later finds nobody."""
    waits = {"hold": ("until", "waiting"), "block": ("untilError", None)}[what]
    with served.serving(tmp_path / "server", large, page=page, updates=1, rounds=2) as server:
        device, begun = joined(server)
        told = device.do_alone(
            *((what, ["task.json", "GET", 1]), *begun, ("tap", "send"), ("untilStatus", "Sent"), waits),
            *(("tap", "clear"), ("untilText", ["persistence", "deleted"]), ("read", "count"), ("read", "sum")),
            *(("restart", None), ("open", server.url), ("untilError", None), ("read", "error")),
        )
    assert told.read[:2] == ["None yet.", "Nothing has been sent yet."]
    assert told.read[2].startswith("This phone has not joined")


def test_what_is_stored_is_deleted_without_a_server(phone: Callable[..., Phone], site: Site) -> None:
    files = """(async () => {
        const names = [], walk = async (folder) => {
            for await (const [name, entry] of folder.entries()) {
                if (entry.kind === 'file') names.push(name);
                else await walk(entry);
            }
        };
        await walk(await navigator.storage.getDirectory());
        return names.join(' ');
    })()"""
    ask(site, SETTINGS)
    device = phone("gone")
    device.do(("untilText", ["told", "added"]), *DONE)
    told = device.do_alone(
        *(("block", ["task.json", "GET", 0]), ("open", site.url), ("untilError", None), ("ask", files)),
        *(("tap", "clear"), ("untilText", ["persistence", "deleted"]), ("ask", files)),
    )
    assert {"client", "lasting.safetensors", "update.safetensors"} < set(told.read[0].split())
    assert told.read[1] == ""


def test_a_file_that_another_tab_replaces_while_it_is_read_is_read_again(
    phone: Callable[..., Phone], site: Site, page: Path
) -> None:
    replacing = """
        const read = Blob.prototype.arrayBuffer;
        Blob.prototype.arrayBuffer = async function () {
            if (this.name === 'update.safetensors') {
                Blob.prototype.arrayBuffer = read;
                const root = await (await navigator.storage.getDirectory()).getDirectoryHandle('fedpara-edge');
                for await (const folder of root.values()) {
                    const isState = folder.kind === 'directory' && folder.name !== 'collected';
                    if (!isState) continue;
                    const access = await (await folder.getFileHandle(this.name)).createSyncAccessHandle();
                    access.truncate(access.getSize() - 1);
                    access.close();
                }
            }
            return read.call(this);
        };
    """
    ask(site, SETTINGS)
    device = phone("reads")
    device.do(("untilText", ["told", "added"]), *DONE)
    site.files["/worker.js"] = replacing.encode() + (page / "worker.js").read_bytes()
    told = device.do_alone(
        *(("open", site.url), ("until", "ready"), ("read", "error"), ("tap", "start"), ("until", "done")),
        *(("tap", "send"), ("untilStatus", "Sent")),
    )
    assert told.read == [""]
    assert len(site.updates) == 1


def test_tabs_show_what_another_one_changed(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    device, opened = phone("tabs"), (("open", site.url), ("until", "ready"))
    added, other = ("untilText", ["count", "29 examples"]), (("tab", None), *opened)
    told = device.do(
        *(added, *other, added, ("press", "Delete tabs.npz"), ("untilText", ["count", "None"])),
        *(("turn", 0), ("untilText", ["count", "None"]), ("ask", "document.getElementById('start').disabled")),
        *(
            ("pick", str(device.data)),
            added,
            ("turn", 1),
            added,
            ("tap", "clear"),
            ("untilText", ["persistence", "deleted"]),
        ),
        *(("turn", 0), ("untilText", ["persistence", "deleted"]), ("until", "ready"), ("read", "count")),
    )
    assert told.read == ["true", "None yet."]


def test_the_screen_stays_on_as_long_as_the_training_goes_on(phone: Callable[..., Phone], site: Site) -> None:
    """Also when examples come that were picked before it began."""
    ask(site, {**SETTINGS, "epochs": 100_000})
    device = phone("awake")
    lock = "{ request: async () => ({ release: () => (document.body.dataset.dark = '') }) }"
    picked = picking(phone("asleep", examples=5).data)
    told = device.do_alone(
        *(("without", f"Object.defineProperty(navigator, 'wakeLock', {{ value: {lock} }})"), ("open", site.url)),
        *(("until", "ready"), ("pick", str(device.data)), ("untilText", ["count", "29 examples"])),
        *(("ask", f"{picked} document.getElementById('start').click()"), ("untilStep", 5)),
        *(("untilText", ["count", "34 examples"]), ("ask", "'dark' in document.body.dataset")),
        *(("tap", "pause"), ("untilStatus", "Paused"), ("ask", "'dark' in document.body.dataset")),
    )
    assert told.read[1:] == ["false", "true"]


def test_a_page_that_reaches_nobody_goes_on_by_itself(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    told = phone("alone").do_alone(
        *(("block", ["task.json", "GET", 0]), ("open", site.url), ("untilError", None), ("read", "error")),
        *(("unblock", None), ("untilText", ["model", "round 1"]), ("ask", "document.querySelector('#trouble').hidden")),
    )
    assert told.read == [
        "There is no connection to the server. Nothing is lost; the page tries again by itself.",
        "true",
    ]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (403, "expected the name under which this device joined, found 'other'"),
        (413, "expected at most 1000 bytes, as updates of this model have, found 2000"),
        (422, "expected finite values, found NaN"),
    ],
)
def test_a_refused_update_is_told_of_and_can_be_sent_again(
    status: int, sentence: str, phone: Callable[..., Phone], site: Site
) -> None:
    ask(site, SETTINGS)
    site.refusals = [(status, sentence)]
    refused = (("tap", "send"), ("untilError", None), ("read", "error"), ("read", "detail"), ("read", "count"))
    told = phone("refused").do(*DONE, *refused, ("tap", "send"), ("untilStatus", "Sent"), ("read", "contributions"))
    assert told.read[:3] == [
        "The server did not accept the update. Your examples are still here. Tell whoever runs it.",
        f"the server: expected to take the update, found {status}: {sentence}",
        "29 examples on this phone",
    ]
    assert told.read[3].startswith("Round 1, ")
    assert len(site.updates) == 1
    assert told.sent(site) == 2 * [("updates", len(site.updates[0]))], "the same update, and nothing else"


def test_too_little_memory_loses_nothing(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    device, opened = phone("small"), ("open", site.url)
    device.do(("untilText", ["count", "29 examples"]))
    # Pages of 64 KiB, of which the runtime has 256 before the model is there.
    poor = device.with_options("--js-flags=--wasm-max-mem-pages=257")
    told = poor.do_alone(opened, ("untilError", None), ("read", "error"))
    assert told.read == [
        "This phone has too little memory for this right now. Nothing is lost: close other apps and pages and try "
        "again."
    ]
    assert device.do_alone(opened, ("until", "ready"), ("read", "count"), *DONE).read == ["29 examples on this phone"]


def test_a_full_storage_loses_nothing(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    full = (
        *(("untilText", ["count", "29 examples"]), ("quota", 1)),
        *(("tap", "start"), ("untilError", None), ("read", "error"), ("read", "count")),
    )
    told = phone("full").do(*full, ("quota", 1 << 30), *DONE)
    assert told.read == [
        "The storage of this phone is full. Nothing is lost: delete something else and try again.",
        "29 examples on this phone",
    ]


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("WebAssembly.validate = () => false", "This browser cannot train."),
        ("delete window.DecompressionStream", "This browser cannot train."),
        ("Object.defineProperty(window, 'isSecureContext', { value: false })", "This page needs a secure connection."),
    ],
    ids=["SIMD", "streams", "https"],
)
def test_a_browser_that_lacks_something_is_told_so(
    lacking: str, said: str, phone: Callable[..., Phone], site: Site
) -> None:
    ask(site, SETTINGS)
    told = phone("old").do_alone(("without", lacking), ("open", site.url), ("untilError", None), ("read", "error"))
    assert told.read[0].startswith(said)
