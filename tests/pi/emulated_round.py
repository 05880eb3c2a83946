"""Train on emulated Raspberry Pis from a bundle exported here, and compare with the same training done here.

usage: emulated_round.py two-pis USERLAND | pi USERLAND | board USERLAND BOARD

`two-pis` is a round of three clients: two emulated Pis, which train at the same time, and this machine. Their updates
are aggregated here, and a Pi measures the result. `pi` and `board` are one device, which trains and measures. USERLAND
is what userland.sh and install.sh built, BOARD what board.sh did.
"""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from running import (
    HERE,
    Run,
    check_facts,
    distance,
    expect,
    fedpara,
    new_folder,
    read_json,
    relative,
    run_here,
    run_on_board,
    run_on_pi,
    say,
)

DATA = HERE.parents[1] / "fedpara_edge" / "demo" / "fashion_mnist_12k.npz"
ROWS = 400  # of each client
TOLERANCE = 1e-4  # on losses, relative, and on updates, in norm, of the change
ACCURACY = 0.45
EXPORT = (
    f"export {HERE / 'small_cnn.py'}:net --input-shape 1,28,28 --input-dtype uint8 --mean 0.286 --std 0.353 "
    "--exclude 0 --momentum 0.9 -o bundle"
)
LOOK = """\
touch /var/tmp/{client}
python3 facts.py >facts.json
fedpara-edge doctor
"""
TRAIN = """\
fedpara-edge train bundle --data data.npz --state state --client {client} --epochs 2 --lr 0.05 --engine {engine} \
    --threads 1 --json -o update.safetensors >training.json
"""
MEASURE = """\
fedpara-edge evaluate bundle --weights round-1.safetensors --data data.npz --engine onnxruntime --json >measured.json
fedpara-edge predict folded.onnx --data data.npz --overwrite -o predicted.npz >/dev/null
"""


def try_round(work: Path, userland: Path) -> None:
    """Two Pis and this machine train, each on its own data; their updates make the next round, which a Pi measures."""
    names = ("one", "two")
    pis = {name: partial(run_on_pi, userland, work / name) for name in names}
    homes = {name: make_home(work, name, number) for number, name in enumerate(names)}
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(pis[name], homes[name], script(name, LOOK, TRAIN)) for name in names]
        for done in running:
            done.result()
    facts = {name: check_facts(homes[name], userland) for name in names}
    for name in names:
        expect(facts[name]["interfaces"] == ["lo"], f"{name} without a connection", facts[name]["interfaces"])
        expect(facts[name]["files"] == [name], f"{name} to see only its own files", facts[name]["files"])
        compare(homes[name], repeat_here(work, name, names.index(name)))
    networks = {str(Path("/proc/self/ns/net").readlink()), *(facts[name]["network"] for name in names)}
    expect(len(networks) == 3, "a network namespace for each device", networks)

    homes["here"] = make_home(work, "here", 2)
    run_here(homes["here"], script("here", TRAIN, engine="ort-training"))
    aggregate(work, *homes.values())
    measure(homes["one"], pis["one"], work)
    accuracy = evaluate(work)
    expect(accuracy > ACCURACY, f"an accuracy above {ACCURACY} after the round", accuracy)
    say(f"two Raspberry Pis and this machine: accuracy {accuracy:.1%} after one round")


def try_one(work: Path, userland: Path, run: Run) -> None:
    """One device trains and measures what it learned."""
    home = make_home(work, "one", 0)
    run(home, script("one", LOOK, TRAIN))
    check_facts(home, userland)
    compare(home, repeat_here(work, "one", 0))
    aggregate(work, home)
    measure(home, run, work)


def make_home(work: Path, client: str, number: int, of: str = "homes") -> Path:
    """A folder with what a client starts from: the bundle and its own rows of the data."""
    home = work / of / client
    shutil.copytree(work / "bundle", home / "bundle")
    shutil.copy(HERE / "facts.py", home)
    data, rows = np.load(DATA), slice(number * ROWS, (number + 1) * ROWS)
    np.savez(home / "data.npz", x=data["x_train"][rows], y=data["y_train"][rows])
    return home


def script(client: str, *parts: str, engine: str = "onnxruntime") -> str:
    """One shell script of these parts, which ends with the first failure."""
    return "set -eu\n" + "".join(parts).format(client=client, engine=engine)


def repeat_here(work: Path, client: str, number: int) -> Path:
    """A home where this machine did the training of a device."""
    home = make_home(work, client, number, of="repeated")
    run_here(home, script(client, TRAIN))
    return home


def compare(home: Path, repeated: Path) -> None:
    """Hold a device's update and losses against those of the same training here."""
    apart = distance(home / "update.safetensors", repeated / "update.safetensors")
    reports = [read_json(folder / "training.json") for folder in (home, repeated)]
    losses = relative(*(report["losses"] for report in reports))
    trained = f"{reports[0]['steps']} steps in {reports[0]['seconds']:.0f} s"
    say(f"{home.name}: {trained}; apart from this machine's by {apart:.1e} of the change, losses by {losses:.1e}")
    expect(apart < TOLERANCE, f"an update within {TOLERANCE} of this machine's", apart)
    expect(losses < TOLERANCE, f"losses within {TOLERANCE} of this machine's", losses)


def aggregate(work: Path, *homes: Path) -> None:
    """Make round 1 of the updates in some homes."""
    updates = [str(home / "update.safetensors") for home in homes]
    fedpara(work, f"aggregate {' '.join(updates)} --weights bundle/weights.safetensors -o round-1.safetensors")


def measure(home: Path, run: Run, work: Path) -> None:
    """Have a device use round 1, as it is and folded to int8, and hold what it finds against what this machine does."""
    shutil.copy(work / "round-1.safetensors", home)
    data = home / "data.npz"
    fedpara(work, f"fold bundle --weights round-1.safetensors --precision int8 --data {data} -o {home / 'folded.onnx'}")
    (found, labels), (expected, labels_here) = (measurement(home, use) for use in (run, run_here))
    apart, same = relative([found["loss"]], [expected["loss"]]), float(np.mean(labels == labels_here))
    accuracy = f"{home.name} measures round 1: accuracy {found['accuracy']:.1%}"
    say(
        f"{accuracy}, loss apart from this machine's by {apart:.1e}; folded to int8, {same:.1%} of the same predictions"
    )
    expect(apart < TOLERANCE, f"a loss within {TOLERANCE} of this machine's", apart)
    expect(same > 0.98, "the predictions of this machine", same)


def measurement(home: Path, run: Run) -> tuple[dict[str, Any], NDArray[Any]]:
    """Loss and accuracy of round 1 on the home's data, and the labels that the folded model predicts."""
    run(home, script("", MEASURE))
    return read_json(home / "measured.json"), np.load(home / "predicted.npz")["predicted"]


def evaluate(work: Path) -> float:
    """Accuracy of round 1 on data that no client has."""
    data = np.load(DATA)
    np.savez(work / "test.npz", x=data["x_test"], y=data["y_test"])
    result = fedpara(work, "evaluate bundle --weights round-1.safetensors --data test.npz --json")
    return float(json.loads(result)["accuracy"])


def main(kind: str, userland: Path, board: Path | None = None) -> None:
    """As the module says."""
    with new_folder(userland) as work:
        fedpara(work, EXPORT)
        if kind == "two-pis":
            try_round(work, userland)
        elif kind == "pi":
            try_one(work, userland, partial(run_on_pi, userland, work / "pi"))
        elif kind == "board" and board is not None:
            try_one(work, userland, partial(run_on_board, board, userland))
        else:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1], *(Path(argument).resolve() for argument in sys.argv[2:]))
