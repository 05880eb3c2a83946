"""A federation of two emulated Raspberry Pis, a phone in Chromium and this machine, on one server.

usage: PYTHONPATH=tests emulated_serving.py USERLAND

The server, the Pis and this machine run the commands that users type; the phone opens the link. All four train in each
round, and the server says by its metrics what came of it. The Pis are emulated without namespaces, as in install.sh, so
that they reach this machine's network. USERLAND is what userland.sh and install.sh built.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from phone_tools import PHONE, WEB, node, run_node, run_program
from running import HERE, SECONDS, expect, fedpara, new_folder, say

DATA = HERE.parents[1] / "fedpara_edge" / "demo" / "fashion_mnist_12k.npz"
ROWS, ROUNDS = 200, 2
DEVICES = ("pi-one", "pi-two", "here", "phone")
ACCURACY = 0.35
EXPORT = "export mlp --gamma 0.3 --mean 0.286 --std 0.353 --engines onnxruntime -o bundle"
SERVE = (
    f"serve bundle --state server --port 0 --page page --updates {len(DEVICES)} --rounds {ROUNDS} --lr 0.1 "
    "--codec int8 --downlink-codec int8 --test test.npz"
)


def make_data(work: Path) -> None:
    """Rows of their own for all devices, and for the test."""
    data = np.load(DATA)
    for number, name in enumerate(DEVICES):
        rows = slice(number * ROWS, (number + 1) * ROWS)
        np.savez(work / f"{name}.npz", x=data["x_train"][rows], y=data["y_train"][rows])
    np.savez(work / "test.npz", x=data["x_test"][: 2 * ROWS], y=data["y_test"][: 2 * ROWS])


@contextmanager
def serving(work: Path) -> Iterator[str]:
    """A server, by its join link."""
    command = [sys.executable, "-m", "fedpara_edge", *SERVE.split()]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.send_signal(signal.SIGTERM)
            expect(server.wait(60) == 0, "a server that ends in order", server.returncode)


def start_device(work: Path, name: str, link: str, userland: Path | None) -> subprocess.Popen[str]:
    """An agent on an emulated Pi, or on this machine."""
    python, variables = [sys.executable], dict(os.environ)
    if userland is not None:
        root = userland / "root"
        python = [str(userland / "qemu"), "-L", str(root), str(root / "usr/bin/python3")]
        variables = {"PATH": os.environ["PATH"], "HOME": str(userland), "QEMU_CPU": "cortex-a72"}
    arguments = ["device", link, "--data", f"{name}.npz", "--state", name, "--client", name, "--threads", "1", "--json"]
    command = [*python, "-m", "fedpara_edge", *arguments]
    return subprocess.Popen(command, cwd=work, env=variables, stdout=subprocess.PIPE, text=True)


def use_phone(work: Path, link: str) -> subprocess.Popen[str]:
    """A phone that opens the link, and trains and sends in every round."""
    once = [["tap", "start"], ["until", "done"], ["tap", "send"], ["untilStatus", "Sent"]]
    actions = [["open", link], ["until", "ready"], ["pick", str(work / "phone.npz")], *once]
    for _ in range(ROUNDS - 1):
        actions += [["until", "ready"], *once]
    command = [node(), str(PHONE / "phone.mjs"), run_program("sh", PHONE / "browser.sh").strip(), str(work / "profile")]
    phone = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert phone.stdin is not None
    phone.stdin.write(json.dumps([*actions, ["untilModel", "finished"]]))
    phone.stdin.close()
    return phone


def main(userland: Path) -> None:
    """As the module says."""
    with new_folder(userland) as work:
        make_data(work)
        fedpara(work, EXPORT)
        run_node(WEB / "build.mjs", work / "page")
        with serving(work) as link:
            running = {name: start_device(work, name, link, userland) for name in DEVICES[:2]}
            running |= {"here": start_device(work, "here", link, None), "phone": use_phone(work, link)}
            try:
                ended = {name: process.wait(SECONDS) for name, process in running.items()}
            finally:
                for process in running.values():
                    process.kill()
        expect(set(ended.values()) == {0}, "devices that end with the federation", ended)
        lines = [json.loads(line) for line in (work / "server" / "metrics.jsonl").read_text().splitlines()]
    expect([line["event"] for line in lines] == ["arm", *["round"] * ROUNDS, "done"], "all rounds", lines)
    rounds = lines[1:-1]
    for line in rounds:
        found = {name: line[name] for name in ("participants", "updates", "rejected", "stragglers")}
        expect([*found.values()] == [4, 4, 0, 0], "an update of each device, and no failure", found)
    expect(rounds[-1]["accuracy"] > ACCURACY, f"an accuracy above {ACCURACY}", rounds[-1]["accuracy"])
    seconds = " and ".join(f"{line['seconds']:.0f} s" for line in rounds)
    accuracy = f"accuracy {rounds[-1]['accuracy']:.1%} after rounds of {seconds}"
    say(f"two Raspberry Pis, a phone and this machine on one server: {accuracy}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
