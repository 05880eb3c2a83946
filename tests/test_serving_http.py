"""A server that answers: tokens, caching, resumable uploads, limits, and updates while it is killed again and again."""

import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from served import Process, Served, base_of, bundle_in, serving, update_of, wait_until
from softmax_regression import CLASSES, FEATURES

from device_runtime.agent.connection import Answer, Connection, UnreachableError
from device_runtime.agent.link import connect, read_link
from device_runtime.agent.member import Member
from device_runtime.agent.transfers import PARTIAL, fetch, send
from fedpara_edge.aggregation import AggregateConfig
from fedpara_edge.errors import InvalidUpdateError, TrustError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.tables import max_update_bytes
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.serving.certificates import keep_certificates
from fedpara_edge.serving.invitation import keep_address, qr_code
from fedpara_edge.serving.rounds import RoundFolder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_in(tmp_path)


@pytest.fixture
def served(tmp_path: Path, bundle: Bundle) -> Iterator[Served]:
    with serving(tmp_path / "server", bundle, updates=2) as server:
        yield server


def ask(
    served: Served, method: str, place: str, token: str | None = None, body: bytes | None = None, **headers: str
) -> Answer:
    connection = Connection(served.url)
    connection.token = token
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return connection.request(method, place, body=body, headers=fields)


def test_who_has_no_token_gets_nothing(served: Served, tmp_path: Path) -> None:
    tokens, now = served.running.tokens, time.time()
    device = tokens.make("device", "ann")
    places = {"/task.json": "GET", "/files/x": "GET", "/updates": "POST", "/metrics": "GET", "/join": "POST"}
    forged = device[:-1] + ("A" if device[-1] != "A" else "B")
    for token in (None, "", "x", forged, "a.b.c.d", tokens.make("join", expires=now - 1), "ü"[:0] + "device...."):
        for place, method in places.items():
            answer = ask(served, method, place, token, b"" if method == "POST" else None)
            assert answer.status == 401, (token, place)
            assert answer.headers["www-authenticate"] == "Bearer"
    assert ask(served, "GET", "/task.json", device).status == 401, "the name has not joined"
    member = served.member(tmp_path / "ann", "ann")
    token = member.connection.token
    assert ask(served, "GET", "/task.json", token).status == 200
    assert ask(served, "GET", "/metrics", token).status == 401
    assert ask(served, "POST", "/join", token, b"{}").status == 401
    assert ask(served, "GET", "/healthz").content == b"ok\n"


def test_a_name_belongs_to_the_device_that_joined_with_it(served: Served) -> None:
    join = served.link.token

    def joined(client: str | None, secret: str) -> Answer:
        return ask(served, "POST", "/join", join, json.dumps({"client": client, "secret": secret}).encode())

    first = joined("ann", "s" * 32)
    assert first.status == 201
    assert joined("ann", "s" * 32).content == first.content, "who was not told may ask again"
    other = joined("ann", "t" * 32)
    assert (other.status, b"another" in other.content) == (409, True)
    made = json.loads(joined(None, "u" * 32).content)["client"]
    assert made == json.loads(joined(None, "u" * 32).content)["client"]
    for client, secret in (("a\nb", "s" * 32), ("bob", "short"), (7, "s" * 32)):
        assert joined(client, secret).status == 400  # type: ignore[arg-type]
    assert ask(served, "POST", "/join", join, b"[]").status == 400
    assert ask(served, "POST", "/join", join, b"x" * 5000).status == 413


def test_files_can_be_kept_for_good(served: Served, tmp_path: Path, bundle: Bundle) -> None:
    member = served.member(tmp_path / "ann", "ann")
    task = member.task(wait=False)
    token = member.connection.token
    answer = ask(served, "GET", task.weights, token)
    assert answer.content == bundle.file("weights.safetensors").read_bytes()
    assert "immutable" in answer.headers["cache-control"]
    again = ask(served, "GET", task.weights, token, If_None_Match=answer.headers["etag"])
    assert (again.status, again.content) == (304, b"")
    part = ask(served, "GET", task.weights, token, Range="bytes=10-", If_Range=answer.headers["etag"])
    assert (part.status, part.content) == (206, answer.content[10:])
    assert ask(served, "GET", f"{task.bundle}/manifest.json", token).status == 200
    for place in (f"{task.bundle}/../key", "files/../key", "files/key", f"{task.bundle}/nothing"):
        assert ask(served, "GET", place, token).status == 404
    assert "content-security-policy" in answer.headers


def test_a_broken_download_goes_on(served: Served, tmp_path: Path, bundle: Bundle) -> None:
    member = served.member(tmp_path / "ann", "ann")
    task = member.task(wait=False)
    whole = bundle.file("weights.safetensors").read_bytes()
    digest = task.weights.rpartition("/")[2]
    (tmp_path / "w.part").write_bytes(whole[:100])
    assert fetch(member.connection, task.weights, tmp_path / "w", digest) == len(whole) - 100
    assert (tmp_path / "w").read_bytes() == whole
    assert fetch(member.connection, task.weights, tmp_path / "w", digest) == 0
    (tmp_path / "v.part").write_bytes(b"x" * 100)
    with pytest.raises(UnreachableError, match="found another"):
        fetch(member.connection, task.weights, tmp_path / "v", digest)
    assert fetch(member.connection, task.weights, tmp_path / "v", digest) == len(whole)


def test_an_upload_goes_on_where_it_stopped(served: Served, tmp_path: Path, bundle: Bundle) -> None:
    member = served.member(tmp_path / "ann", "ann")
    assert member.task(wait=False).train
    update = update_of(tmp_path / "sent", base_of(bundle), "ann")
    content, token = update.read_bytes(), member.connection.token
    begun = ask(served, "POST", "updates", token, b"", Upload_Complete="?0", Upload_Length=str(len(content)))
    assert begun.status == 201
    place = begun.headers["location"]

    def patch(offset: int, piece: bytes, complete: str) -> Answer:
        fields = {"Content_Type": PARTIAL, "Upload_Offset": str(offset), "Upload_Complete": complete}
        return ask(served, "PATCH", place, token, piece, **fields)

    assert patch(0, content[:50], "?0").status == 204
    wrong = patch(40, content[40:], "?1")
    assert (wrong.status, wrong.headers["upload-offset"]) == (409, "50")
    found = ask(served, "HEAD", place, token)
    assert (found.status, found.headers["upload-offset"], found.headers["upload-complete"]) == (204, "50", "?0")
    _drop_in_the_middle(served, place, str(token), content, begin=50, stop=90)
    wait_until(lambda: ask(served, "HEAD", place, token).headers["upload-offset"] == "90")
    assert patch(90, content[90:], "?1").status == 201
    assert ask(served, "HEAD", place, token).status == 404
    assert ask(served, "POST", "updates", token, content).status == 200, "the same again"
    assert served.running.federation.round.count == 1


def _drop_in_the_middle(served: Served, place: str, token: str, content: bytes, *, begin: int, stop: int) -> None:
    """Send some of a body, and break the connection."""
    head = (
        f"PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: {PARTIAL}\r\n"
        f"Upload-Offset: {begin}\r\nUpload-Complete: ?1\r\nContent-Length: {len(content) - begin}\r\n\r\n"
    )
    with socket.create_connection((served.running.host, served.running.port)) as connection:
        connection.sendall(head.encode() + content[begin:stop])
        time.sleep(0.2)


def test_uploads_that_do_not_fit_are_refused(served: Served, tmp_path: Path, bundle: Bundle) -> None:
    member, other = served.member(tmp_path / "ann", "ann"), served.member(tmp_path / "ben", "ben")
    token, most = member.connection.token, max_update_bytes(bundle.manifest.layout)
    assert 4 * CLASSES * (FEATURES + 1) < most < 1 << 20
    assert ask(served, "POST", "updates", token, b"", Upload_Complete="?0", Upload_Length=str(most + 1)).status == 413
    assert ask(served, "POST", "updates", token, b"", Upload_Complete="yes").status == 400
    assert ask(served, "POST", "updates", token, b"", Upload_Complete="?0", Upload_Length="-1").status == 400
    unknown_length = ask(served, "POST", "updates", token, b"", Upload_Complete="?0")
    place = unknown_length.headers["location"]
    fields = {"Content_Type": PARTIAL, "Upload_Offset": "0", "Upload_Complete": "?0"}
    assert ask(served, "PATCH", place, token, b"x" * (most + 1), **fields).status == 413
    assert ask(served, "HEAD", place, token).status == 404
    begun = ask(served, "POST", "updates", token, b"abc", Upload_Complete="?0", Upload_Length="5").headers
    place = begun["location"]
    assert ask(served, "HEAD", place, other.connection.token).status == 404, "another device's"
    assert ask(served, "PATCH", place, token, b"de", **{**fields, "Content_Type": "text/plain"}).status == 415
    more = {"Content_Type": PARTIAL, "Upload_Offset": "3", "Upload_Complete": "?1"}
    assert ask(served, "PATCH", place, token, b"defg", **more).status == 400
    place = ask(served, "POST", "updates", token, b"", Upload_Complete="?0", Upload_Length="5").headers["location"]
    assert ask(served, "DELETE", place, token).status == 204
    assert ask(served, "HEAD", place, token).status == 404
    garbage = ask(served, "POST", "updates", token, b"garbage")
    assert garbage.status == 422
    assert garbage.content.startswith(b"update of 'ann': ")
    assert not any((tmp_path / "server" / "uploads").iterdir())


def test_a_device_has_one_upload_at_a_time(served: Served, tmp_path: Path) -> None:
    token = served.member(tmp_path / "ann", "ann").connection.token
    places = [
        ask(served, "POST", "updates", token, b"", Upload_Complete="?0", Upload_Length="9").headers["location"]
        for _ in range(3)
    ]
    assert [ask(served, "HEAD", place, token).status for place in places] == [404, 404, 204]
    assert len(list((tmp_path / "server" / "uploads").iterdir())) == 1


def test_a_late_update_is_refused_for_good(served: Served, tmp_path: Path, bundle: Bundle) -> None:
    base = base_of(bundle)
    members = {name: served.member(tmp_path / name, name) for name in ("ann", "ben", "cat")}
    for name, member in members.items():
        assert member.task(wait=False).train
        update_of(tmp_path / "sent", base, name)
    for name in ("ann", "ben"):
        assert send(members[name].connection, "updates", tmp_path / "sent" / f"{name}-0.update")
    served.wait_for_round(1)
    with pytest.raises(InvalidUpdateError, match="round: expected 1, found 0"):
        send(members["cat"].connection, "updates", tmp_path / "sent" / "cat-0.update")
    assert not send(members["ann"].connection, "updates", tmp_path / "sent" / "ann-0.update")
    assert served.running.federation.round.count == 0


def test_devices_that_wait_hear_of_the_next_round(served: Served, tmp_path: Path, bundle: Bundle) -> None:
    base, heard = base_of(bundle), list[int]()
    members = {name: served.member(tmp_path / name, name) for name in ("ann", "ben")}
    for name, member in members.items():
        assert member.task(wait=False).train
        update_of(tmp_path / "sent", base, name)
    assert send(members["ann"].connection, "updates", tmp_path / "sent" / "ann-0.update")
    waiting = threading.Thread(target=lambda: heard.append(members["ann"].task(wait=True).round))
    begun = time.monotonic()
    waiting.start()
    time.sleep(0.3)
    assert not heard
    assert send(members["ben"].connection, "updates", tmp_path / "sent" / "ben-0.update")
    waiting.join(20)
    assert heard == [1]
    assert time.monotonic() - begun < 10


def test_changes_lead_to_the_weights(tmp_path: Path, bundle: Bundle) -> None:
    aggregate = AggregateConfig(downlink_codec="uniform")
    with serving(tmp_path / "server", bundle, aggregate=aggregate, updates=1) as served:
        ann, ben = (served.member(tmp_path / name, name) for name in ("ann", "ben"))
        opened = ben.bundle(ben.task(wait=False))
        ben.receive(ben.task(wait=False), opened)
        for number in range(2):
            task = ann.task(wait=False)
            ann.receive(task, opened)
            update_of(tmp_path / "sent", read_weights(ann.weights), "ann")
            send(ann.connection, "updates", tmp_path / "sent" / f"ann-{number}.update")
            served.wait_for_round(number + 1)
        task = ben.task(wait=False)
        assert len(task.history) <= 2
        ben.receive(task, opened)
        assert read_weights(ben.weights).base == task.base


def test_requests_are_counted_and_limited(tmp_path: Path, bundle: Bundle) -> None:
    with serving(tmp_path / "server", bundle, requests_per_minute=20) as served:
        member = served.member(tmp_path / "ann", "ann")
        token, operator = member.connection.token, served.running.tokens.make("operator")
        for _ in range(20):
            assert ask(served, "GET", "/task.json", token).status == 200
        with pytest.raises(UnreachableError, match="at most 20 requests") as limited:
            ask(served, "GET", "/task.json", token)
        assert limited.value.after_seconds == 2
        for _ in range(20):
            assert ask(served, "GET", "/task.json", "guess").status == 401
        with pytest.raises(UnreachableError, match="429"):
            ask(served, "GET", "/task.json", "guess")
        measures = ask(served, "GET", "/metrics", operator)
        text = measures.content.decode()
        assert measures.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'fedpara_edge_requests_total{status="429"} 2' in text
        assert "fedpara_edge_devices 1\n" in text


def test_a_silent_sender_is_given_up(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpara_edge.serving.requests.PIECE_SECONDS", 0.2)
    token = served.member(tmp_path / "ann", "ann").connection.token
    head = f"POST /updates HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 100\r\n\r\nabc"
    with socket.create_connection((served.running.host, served.running.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(1000)


@pytest.mark.slow
@pytest.mark.usefixtures("bundle")
def test_killed_again_and_again_it_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    clients, rounds, answered = [f"device-{number}" for number in range(4)], 6, set[tuple[str, int]]()
    process = Process(tmp_path, "--updates", "4", "--rounds", str(rounds), "--requests-per-minute", "100000")
    process.start()
    link, ended, failures = read_link(process.link), threading.Event(), list[BaseException]()

    def take_part(client: str) -> None:
        try:
            (tmp_path / client).mkdir()
            member = Member(tmp_path / client, Connection(process.url))
            patiently(lambda: member.join(link, client))
            while (task := patiently(lambda: member.task(wait=True))).phase != "finished":
                if not task.train:
                    continue
                opened = patiently(lambda: member.bundle(task))
                patiently(lambda: member.receive(task, opened))  # noqa: B023
                update = update_of(tmp_path / f"sent-{client}", read_weights(member.weights), client)
                patiently(lambda: send(member.connection, "updates", update))  # noqa: B023
                answered.add((client, task.round))
        except BaseException as error:  # noqa: BLE001  (raised again below)
            failures.append(error)

    def patiently(attempt: Any) -> Any:
        while not ended.is_set():
            try:
                return attempt()
            except UnreachableError:
                time.sleep(0.01)
        raise TimeoutError

    threads = [threading.Thread(target=take_part, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    drawing = random.Random(1)
    kills, until = 0, time.monotonic() + 120
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
        time.sleep(drawing.uniform(0.02, 0.5))
        if kills < 5:
            process.kill()
            kills += 1
            process.start()
    ended.set()
    for thread in threads:
        thread.join()
    assert process.stop() == 0
    if failures:
        raise failures[0]
    assert kills >= 3
    counted = [_accepted(tmp_path, number) for number in range(rounds)]
    assert counted == [dict.fromkeys(clients, 1)] * rounds
    assert answered == {(client, number) for client in clients for number in range(rounds)}
    assert read_weights(tmp_path / "server" / "weights" / f"round-{rounds}.safetensors").round == rounds
    metrics = tmp_path / "server" / "metrics.jsonl"
    process.start()
    wait_until(lambda: metrics.exists() and '"event": "done"' in metrics.read_text())
    assert process.stop() == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["arm", *["round"] * rounds, "done"]
    assert [line["round"] for line in lines[1:-1]] == [*range(1, rounds + 1)]


def _accepted(folder: Path, number: int) -> Mapping[str, int]:
    """How often each client counted in a round."""
    result = RoundFolder(folder / "server" / "rounds" / str(number)).result
    assert result is not None
    counts: dict[str, int] = {}
    for each in result["accepted"]:
        counts[each["client"]] = counts.get(each["client"], 0) + 1
    return counts


@pytest.mark.slow
@pytest.mark.usefixtures("bundle")
def test_a_server_makes_itself_a_certificate_that_its_link_vouches_for(tmp_path: Path) -> None:
    process = Process(tmp_path, "--tls-lan", "--updates", "1", scheme="https")
    process.start()
    link = read_link(process.link)
    assert link.ca is not None
    (tmp_path / "ann").mkdir()
    member = Member(tmp_path / "ann", connect(link, None, tmp_path / "ann"))
    member.join(link, "ann")
    assert member.task(wait=False).train
    again = Member(tmp_path / "ann", connect(replace(link, token=None), None, tmp_path / "ann"))
    assert again.task(wait=False).round == 0
    with pytest.raises(TrustError, match="expected the certificate that the join link names"):
        connect(replace(link, ca="0" * 64), None, tmp_path)
    with pytest.raises(UnreachableError, match="a certificate that this device does not trust"):
        connect(replace(link, ca=None), None, tmp_path).request("GET", "healthz")
    tls = tmp_path / "server" / "tls"
    before = (tls / "ca.pem").read_bytes()
    named = connect(replace(link, ca=None), tls / "ca.pem", tmp_path)
    assert named.request("GET", "ca.pem").content == before
    assert process.stop() == 0
    process.start()
    assert read_link(process.link).ca == link.ca, "as long as it is good"
    process.stop()
    assert (tls / "server-key.pem").stat().st_mode & 0o077 == 0


def test_certificates_are_made_anew_for_other_names(tmp_path: Path) -> None:
    assert keep_certificates(tmp_path, {"localhost", "127.0.0.1"}, authority="one")
    assert not keep_certificates(tmp_path, {"localhost"}, authority="one")
    assert keep_certificates(tmp_path, {"localhost", "10.0.0.7"}, authority="one")
    (tmp_path / "ca.pem").write_text("damaged")
    assert keep_certificates(tmp_path, {"localhost"}, authority="one")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--tls-certificate", "bundle/manifest.json"), "--tls-key: expected the certificate and its key"),
        (("--tls-certificate", "x", "--tls-key", "y", "--tls-lan"), "--tls-lan: expected without --tls-certificate"),
        (("--tls-certificate", "bundle/manifest.json", "--tls-key", "y"), "expected a certificate in PEM"),
        (("--host", "256.0.0.1"), "expected an address to listen on"),
        (("--page", "bundle"), "--page: bundle: expected the page that `make page` writes"),
        (("--updates", "3", "--participants", "2"), "--participants: expected at least 3"),
        (("--client-algorithm", "scaffold"), "--client-algorithm: expected scaffold with the server's algorithm"),
        (("--min-updates", "3"), "--min-updates: expected at most 2"),
    ],
)
@pytest.mark.usefixtures("bundle")
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], text: str, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("serve", "bundle", "--state", "server", "--port", "0", *options)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert text in ended.err


def test_invitations_let_devices_in_without_a_restart(tmp_path: Path, bundle: Bundle, run: Command) -> None:
    refused = run("invite", str(tmp_path / "server"))
    assert refused.code == 2
    assert refused.err.endswith("found No such file or directory; start `serve` on this folder\n")
    with serving(tmp_path / "server", bundle) as served:
        keep_address(tmp_path / "server", served.url, None)
        link = read_link(run("invite", str(tmp_path / "server"), "--hours", "1").out)
        (tmp_path / "ann").mkdir()
        Member(tmp_path / "ann", Connection(link.url)).join(link, "ann")
        operator = run("invite", str(tmp_path / "server"), "--operator", "--json").json["link"]
        assert ask(served, "GET", "/metrics", operator.partition("#operator=")[2]).status == 200
    assert len(qr_code("https://192.168.1.20:8443/#join=" + "x" * 130).splitlines()) > 20


def test_an_operator_sees_and_steers_the_rounds(served: Served, tmp_path: Path, bundle: Bundle) -> None:
    operator = served.running.tokens.make("operator")
    member = served.member(tmp_path / "ann", "ann")

    def state() -> Any:
        return json.loads(ask(served, "GET", "/operator/state", operator).content)

    def do(what: str) -> int:
        return ask(served, "POST", f"/operator/{what}", operator, b"").status

    for place in ("/operator", "/operator/operator.js", "/operator/look.css", "/operator/operator.css"):
        assert ask(served, "GET", place).status == 200
    assert ask(served, "GET", "/operator/../key").status == 404
    for method, place in (("GET", "state"), ("POST", "pause"), ("POST", "close")):
        for token in (None, served.link.token, member.connection.token):
            assert ask(served, method, f"/operator/{place}", token, b"" if method == "POST" else None).status == 401
    assert do("close") == 409
    assert do("stop") == 404
    assert do("pause") == 204
    assert not member.task(wait=False).train
    assert state()["phase"] == "paused"
    assert do("resume") == 204
    assert member.task(wait=False).train
    garbage = ask(served, "POST", "updates", member.connection.token, b"garbage")
    assert state()["devices"][0]["error"] == garbage.content.decode().strip()
    update = update_of(tmp_path / "sent", base_of(bundle), "ann")
    send(member.connection, "updates", update)
    assert [state()[name] for name in ("updates", "wanted", "asked")] == [1, 2, 1]
    assert do("close") == 204
    wait_until(lambda: bool(state()["rounds"]))  # which are recorded after the next round is open
    found = state()
    (row,) = found["rounds"]
    assert [row[name] for name in ("round", "updates", "rejected", "stragglers", "train_loss")] == [1, 1, 0, 0, 0.5]
    assert row["up_bytes"] == update.stat().st_size + len(b"garbage")
    assert found["devices"][0] == {
        "client": "ann", "is_here": True, "has_sent": False, "is_asked": False, "round": 0, "error": None,
    }  # fmt: skip
