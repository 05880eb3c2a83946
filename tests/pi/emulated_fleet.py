"""A fleet on Flower with a node on this machine and one on an emulated Raspberry Pi, by the commands that users type.

usage: emulated_fleet.py USERLAND

USERLAND is what userland.sh and install.sh built, with the extra [fleet]. The Pi is emulated without namespaces, as in
install.sh, so that it reaches this machine's network. It trains the engine that its wheels have, and its updates count
beside those of this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from running import HERE, SECONDS, expect, fedpara, new_folder, say

from fedpara_edge.fleet.ports import free_ports

DATA = HERE.parents[1] / "fedpara_edge" / "demo" / "fashion_mnist_12k.npz"
ROWS, ROUNDS = 300, 2
ACCURACY = 0.35
PLAN = f"""
name = "fashion"
rounds = {ROUNDS}
[data]
path = "images.npz"
clients = 2
split = "iid"
test = ["x_test", "y_test"]
[model]
name = "mlp"
gamma = 0.3
[train]
lr = 0.1
codec = "uniform"
[arms.fedpara]
"""
EXPORT = "export mlp --gamma 0.3 --mean 0.286 --std 0.353 --engines onnxruntime -o bundle"


def start_pi(userland: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The command of the project on an emulated Pi."""
    root = userland / "root"
    python = [userland / "qemu", "-L", root, root / "usr/bin/python3"]
    variables = {"PATH": os.environ["PATH"], "HOME": str(userland), "QEMU_CPU": "cortex-a72", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*python, "-m", "fedpara_edge", *arguments], env=variables)


def run_fleet(work: Path, userland: Path) -> list[dict[str, Any]]:
    """The rounds of a node here and one on a Pi."""
    (port,) = free_ports(1)
    up = f"fleet up app -n 1 --remote 1 --host 127.0.0.1 --port {port} --json"
    server = subprocess.Popen(
        [sys.executable, "-m", "fedpara_edge", *up.split()], cwd=work, stdout=subprocess.PIPE, text=True
    )
    address = f"127.0.0.1:{port}"
    pi = start_pi(userland, "fleet", "node", address, "--data", str(work / "pi.npz"), "--state", str(work / "pi"))
    try:
        out, _ = server.communicate(timeout=SECONDS)
    finally:
        server.terminate()
        pi.send_signal(signal.SIGINT)
        ended = pi.wait(timeout=60)
    expect(server.returncode == 0, "a fleet that succeeds", f"exit code {server.returncode}")
    expect(ended == 130, "a node that ends when it is interrupted", f"exit code {ended}")
    rounds: list[dict[str, Any]] = json.loads(out)["rounds"]
    return rounds


def main(userland: Path) -> None:
    """As the module says."""
    data = np.load(DATA)
    with new_folder(userland) as work:
        names = ("x_train", "y_train", "x_test", "y_test")
        x, y, x_test, y_test = (data[name][: 2 * ROWS] for name in names)
        np.savez(work / "images.npz", x=x[:ROWS], y=y[:ROWS], x_test=x_test, y_test=y_test)
        np.savez(work / "pi.npz", x=x[ROWS:], y=y[ROWS:])
        (work / "plan.toml").write_text(PLAN)
        fedpara(work, EXPORT)
        fedpara(work, "fleet init bundle --plan plan.toml -o app")
        rounds = run_fleet(work, userland)
    for event in rounds:
        found = event["participants"], event["rejected"]
        expect(found == (2, 0), "two devices in a round, and no failure", found)
    expect(len(rounds) == ROUNDS, f"{ROUNDS} rounds", len(rounds))
    accuracy = rounds[-1]["accuracy"]
    expect(accuracy > ACCURACY, f"an accuracy above {ACCURACY}", accuracy)
    seconds = ", ".join(f"{event['seconds']:.1f} s" for event in rounds)
    say(f"a fleet of this machine and a Raspberry Pi: accuracy {accuracy:.1%} after {ROUNDS} rounds of {seconds}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
