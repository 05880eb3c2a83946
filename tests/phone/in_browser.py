"""Phones train in a real browser: whole rounds, and what goes wrong on phones. `make phone` runs this file."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served
from command_line import Command
from emulated_phone import SETTINGS, Phone, ask
from norms import relative_error
from phone_site import Site, serving

from device_runtime import TrainConfig, open_data, open_engine, train
from device_runtime.agent.agent import AgentConfig, run_agent
from device_runtime.sources import Reading
from fedpara_edge.aggregation import AggregateConfig
from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.encoded import read_change
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.serving.rounds import RoundFolder

TOLERANCE = 1e-5
SLOW: dict[str, Any] = {**SETTINGS, "epochs": 400, "codec": "int4", "algorithm": "feddyn:alpha=0.05"}
"""A call long enough to be disturbed, whose state and residual would show any step that is taken twice."""


def change_of(path: Path, weights: Weights) -> np.ndarray:
    update = open_update(path, weights)
    try:
        return read_change(update.file, in_order(weights.layout.shared))
    finally:
        update.close()


def header_of(path: Path, weights: Weights) -> dict[str, Any]:
    update = open_update(path, weights)
    update.close()
    # Losses and the change are rounded otherwise in a browser, and so its sums are others.
    return {**update.file.header, "metrics": None, "sums": None, "digest": None}


def test_the_page_takes_less_than_4_mb_on_the_wire(page: Path) -> None:
    assert sum(file.stat().st_size for file in page.rglob("*.br")) < 4e6


def test_three_rounds_of_two_phones_and_a_native_device(
    phone: Callable[..., Phone], site: Site, bundle: Bundle, run: Command, tmp_path: Path
) -> None:
    """Updates are those of Python, `aggregate` takes them, and nothing leaves a phone but them."""
    phones = {name: phone(name) for name in ("one", "other")}
    path, task = bundle.file(WEIGHTS), {"changes": []}
    for number in range(3):
        weights = read_weights(path, bundle)
        ask(site, SETTINGS, **task)
        updates = []
        for name, device in phones.items():
            told = device.do(
                ("tap", "start"), ("until", "done"), ("tap", "send"), ("untilStatus", "Sent"), ("read", "status")
            )
            assert told.read[0].startswith("Sent ")
            assert told.sent(site) == [("updates", len(site.updates[-1]))]
            found = tmp_path / f"{name}-{number}.safetensors"
            found.write_bytes(site.updates[-1])
            check_against_python(found, device.data, bundle, path, weights)
            updates.append(found)
        native = tmp_path / f"native-{number}.safetensors"
        train_in_python(phones["one"].data, bundle, path, native, state=tmp_path / "native", client="native")
        after, change = tmp_path / f"round-{number + 1}.safetensors", tmp_path / f"change-{number + 1}.safetensors"
        options = ("--weights", path, "--state", tmp_path / "server", "--downlink-codec", "uniform", "--change", change)
        ended = run("aggregate", *updates, native, *options, "-o", after)
        assert ended.code == 0, ended.err
        assert "from 3 updates" in ended.out
        site.files[f"/{change.name}"] = change.read_bytes()
        task["changes"].append(change.name)
        path = after
    assert len(site.updates) == 6


def check_against_python(found: Path, data: Path, bundle: Bundle, path: Path, weights: Weights) -> None:
    """The update is that of a Python device with the same examples, which keeps its own state from round to round."""
    client = header_of(found, weights)["client"]
    expected = found.with_suffix(".expected")
    train_in_python(data, bundle, path, expected, state=data.with_suffix(".twin"), client=client)
    assert header_of(found, weights) == header_of(expected, weights)
    assert relative_error(change_of(found, weights), change_of(expected, weights)) < TOLERANCE


def train_in_python(data: Path, bundle: Bundle, weights: Path, output: Path, *, state: Path, client: str) -> None:
    engine = open_engine(bundle, "onnxruntime", threads=1)
    dataset = open_data(data, bundle.manifest)
    config = TrainConfig(**SETTINGS)
    train(engine, dataset, weights, config, output=output, encoder=find_encoder("float32"), state=state, client=client)


def test_the_page_reaches_its_own_server_and_no_other(phone: Callable[..., Phone], site: Site, page: Path) -> None:
    ask(site, SETTINGS)
    with serving(Site(page)) as other:
        told = phone("kept in").do(("reach", f"{site.url}task.json"), ("reach", f"{other.url}page.css"))
    assert told.read == ["out", "kept in"]


def test_a_killed_browser_goes_on_to_the_same_update(
    phone: Callable[..., Phone], site: Site, bundle: Bundle, tmp_path: Path
) -> None:
    """Hidden, killed in the middle, paused and closed: the update is that of a call that nobody disturbed."""
    ask(site, SLOW)
    device = phone("torn")
    again = (("open", site.url), ("until", "ready"), ("pick", str(device.data)), ("tap", "start"))
    disturbed = device.do(
        *(("tap", "start"), ("untilStep", 40), ("hide", None), ("wait", 300), ("restart", None)),
        *(*again, ("untilStep", 90), ("tap", "pause"), ("untilStatus", "Paused"), ("restart", None)),
        *(*again, ("until", "done"), ("read", "status"), ("tap", "send"), ("untilStatus", "Sent")),
        *(*again, ("until", "done"), ("tap", "send"), ("untilStatus", "Sent")),
        *(
            ("tap", "clear"),
            ("untilText", ["persistence", "deleted"]),
            ("pick", str(device.data)),
            ("tap", "start"),
            ("until", "done"),
        ),
        *(("tap", "send"), ("untilStatus", "Sent")),
    )
    resumed = re.fullmatch(r"Trained in [\d.]+ s, from step (\d+) on\.", disturbed.read[0])
    assert resumed is not None
    assert int(resumed[1]) >= 90
    torn, again_sent, whole = site.updates
    assert torn == again_sent
    weights, undisturbed = read_weights(bundle.file(WEIGHTS), bundle), (tmp_path / "torn", tmp_path / "whole")
    for path, update in zip(undisturbed, (torn, whole), strict=True):
        path.write_bytes(update)
    assert np.array_equal(*(change_of(path, weights) for path in undisturbed))
    headers = [header_of(path, weights) for path in undisturbed]
    names = {header.pop("client") for header in headers}
    assert headers[0] == headers[1]
    assert len(names) == 2, "the name went with all else that was deleted"


def test_a_pause_before_the_first_step_holds(phone: Callable[..., Phone], site: Site) -> None:
    """It comes while the examples are still read."""
    ask(site, {**SLOW, "epochs": 100_000})  # it is not to end by itself
    at_once = """(async () => {
        document.getElementById('start').click();
        await new Promise((go) => setTimeout(go));
        document.getElementById('pause').click();
    })()"""
    told = phone("hasty").do(
        *(
            ("untilText", ["told", "added"]),
            ("ask", at_once),
            ("untilStatus", "Paused"),
            ("ask", "document.body.dataset.now"),
        )
    )
    assert told.read[1:] == ["ready"]


def test_an_update_is_kept_until_it_can_be_sent(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    site.refusals = [(409, "round 1 is over; train for round 2")]
    told = phone("late").do(
        *(
            ("tap", "start"),
            ("until", "done"),
            ("offline", True),
            ("tap", "send"),
            ("untilError", None),
            ("read", "error"),
        ),
        *(("offline", False), ("tap", "send"), ("untilText", ["error", "too late"]), ("read", "detail")),
    )
    assert told.read == [
        "There is no connection. The update is kept on this phone: send it later.",
        "the server: expected to take the update, found 409: round 1 is over; train for round 2",
    ]
    assert not site.updates


def test_two_tabs_do_not_train_at_once(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, {**SLOW, "epochs": 100_000})  # it is not to end before the other tab is there
    device = phone("two")
    told = device.do(
        *(("tap", "start"), ("untilStep", 5), ("tab", None), ("open", site.url), ("until", "ready")),
        *(("pick", str(device.data)), ("tap", "start"), ("untilError", None), ("read", "error")),
    )
    assert told.read == ["This page is at work in another tab. Close one of the two."]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda site: site.files.pop("/task.json"), "/task.json: expected a file on the server, found 404"),
        (
            lambda site: site.files.update({"/bundle/train_step.onnx": b"other"}),
            "train_step.onnx: expected the content that",
        ),
        (lambda site: ask(site, {"codec": "topk"}), "codec: expected one of float32, float16"),
        (lambda site: ask(site, {"epochs": 0}), "epochs: expected an integer from 1, found 0"),
    ],
    ids=["no task", "changed graph", "unknown codec", "no epochs"],
)
def test_what_the_server_has_wrong_is_said_in_a_sentence(
    spoil: Callable[[Site], object], said: str, phone: Callable[..., Phone], site: Site
) -> None:
    ask(site, SETTINGS)
    spoil(site)
    actions = (
        ("open", site.url),
        ("until", "ready"),
        ("pick", str(phone("x").data)),
        ("tap", "start"),
        ("untilError", None),
    )
    where = "detail" if "404" in said else "error"
    opened_with_error = (*actions[:1], ("untilError", None), ("read", where))
    told = phone("x").do_alone(*(opened_with_error if "codec" not in said else (*actions, ("read", where))))
    assert told.read[0].startswith(said)
    assert "; " in told.read[0]


def test_examples_that_do_not_fit_are_refused_in_a_sentence(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    device = phone("wrong")
    np.savez(device.data, x=np.zeros((3, 2), np.float32), y=np.zeros(3, np.int64))
    told = device.do(("untilError", None), ("read", "error"), ("read", "detail"))
    assert told.read == [
        "This file does not fit the model. Nothing was added.",
        "wrong.npz: array 'x': expected shape [N, 1, 8, 8], found [3, 2]; bring the examples to that shape",
    ]


def test_two_phones_and_a_native_device_in_the_rounds_of_a_server(
    phone: Callable[..., Phone], page: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """Phones join by the link, train when they are asked to, and wait for the next round, beside an agent."""
    settings = {**SETTINGS, "codec": "int8"}
    with served.serving(
        tmp_path / "server", bundle, settings=settings, page=page, updates=3, rounds=2,
        aggregate=AggregateConfig(downlink_codec="int8"),
    ) as server:  # fmt: skip
        link = f"{server.url}#join={server.link.token}"
        names = ("one", "other")
        with ThreadPoolExecutor(3) as pool:
            again = ("tap", "start"), ("until", "done"), ("tap", "send"), ("untilStatus", "Sent")
            once = (("open", link), ("until", "ready"), ("read", "address"))
            acting = [
                pool.submit(
                    device.do_alone, *once, ("pick", str(device.data)), *again, ("until", "ready"), *again,
                    ("untilModel", "finished"), ("restart", None), ("open", server.url), ("until", "waiting"),
                )
                for device in map(phone, names)
            ]  # fmt: skip
            config = AgentConfig(patience=60)
            given: dict[str, Any] = {"reading": Reading(), "own": {}, "on_event": lambda *_, **__: None}
            native = pool.submit(
                run_agent, server.link, phone("native").data, tmp_path / "native", config, client="native", **given
            )
            told = [future.result() for future in acting]
            assert native.result().rounds == (0, 1)
        clients = [device.client for device in server.running.federation.devices.all]
    for each in told:
        assert each.read == [server.url], "the token is taken out of the address"
        bodies = [request for request in each.requests if request["bytes"]]
        places = [request["url"].removeprefix(server.url).partition("/")[0] for request in bodies]
        assert places == ["join", "updates", "updates"]
    for number in range(2):
        result = RoundFolder(tmp_path / "server" / "rounds" / str(number)).result
        assert result is not None
        assert [update["client"] for update in result["accepted"]] == sorted(clients)
        assert not result["rejected"]


def test_a_phone_without_a_link_is_told_to_open_it(
    phone: Callable[..., Phone], page: Path, bundle: Bundle, tmp_path: Path
) -> None:
    with served.serving(tmp_path / "server", bundle, page=page) as server:
        for address in (server.url, f"{server.url}#join=guess"):
            told = phone("guest").do_alone(("open", address), ("untilError", None), ("read", "error"))
            assert told.read[0].startswith("This phone has not joined, or its link is no longer valid.")
