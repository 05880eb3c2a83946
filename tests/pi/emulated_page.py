"""Follow docs/howto/mobilenet.md with two emulated Raspberry Pis, and compare with the same done on this machine.

usage: PYTHONPATH=tests emulated_page.py USERLAND

The files, the Python and the commands are those of the page, after the commands of the README that make its data. The
page's loop over devices is run by two Pis at the same time, a turn each, from the bundle and one client's data alone.
USERLAND is what userland.sh and install.sh built.
"""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from pages import blocks, commands
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
    run_on_pi,
    say,
)

ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "howto" / "mobilenet.md"
LOOP = "for i in 0 1;"
DATA = "data/train/client-{0}.npz"
LOOK = "python3 facts.py >facts.json\n"
BEGIN = f"fedpara-edge train mobilenet --data {DATA} --batch-size 500 --lr 0.05 --overwrite -o two-steps.safetensors\n"
MEASURE = f"""\
fedpara-edge evaluate mobilenet --weights mobilenet-1.safetensors --data {DATA} --json >measured.json
fedpara-edge predict mobilenet.onnx --data {DATA} --overwrite -o predicted.npz >/dev/null
"""
TOLERANCE = 1e-4  # on a loss, relative
APART = 1e-3  # of two steps, in norm, of the change; kinks of ReLU6 make 0.2 of rounding in 64 steps
GAIN = 0.02  # of accuracy, by the round


def follow(work: Path, userland: Path) -> None:
    """Do what the page says, its training on Pis, and have each use the result."""
    make_data(work)
    homes = [work / "homes" / f"pi-{number}" for number in (0, 1)]
    pis = [partial(run_on_pi, userland, work / home.name) for home in homes]
    for language, text, name in blocks(PAGE):
        if name is not None:
            (work / name).write_text(text)
        elif language == "python":
            run_here(work, f"python - <<'END'\n{text}END")
        for command, _ in commands(text) if language == "console" else ():
            if command.startswith(LOOP):
                train(work, homes, pis, command)
            else:
                run_here(work, command)
    for home, pi in zip(homes, pis, strict=True):
        check_facts(home, userland)
        use(work, home, pi)
    before, after = (accuracy(work, weights) for weights in ("mobilenet/weights", "mobilenet-1"))
    expect(after > before + GAIN, f"an accuracy above {before + GAIN:.1%} after the round", after)
    say(f"a MobileNet with pretrained weights, to two Raspberry Pis and back: accuracy {before:.1%} -> {after:.1%}")


def make_data(work: Path) -> None:
    """The data of the README's session."""
    for language, text, _ in blocks(ROOT / "README.md"):
        for command, _ in commands(text) if language == "console" else ():
            if command.split()[1] in ("demo", "split"):
                run_here(work, command)


def train(work: Path, homes: list[Path], pis: list[Run], loop: str) -> None:
    """A turn of the page's loop on each Pi, whose updates are put where the page looks for them."""
    for number, home in enumerate(homes):
        shutil.copytree(work / "mobilenet", home / "mobilenet")
        (home / "data" / "train").mkdir(parents=True)
        shutil.copy(work / DATA.format(number), home / "data" / "train")
        shutil.copy(HERE / "facts.py", home)
    with ThreadPoolExecutor() as pool:
        running = [
            pool.submit(pi, home, f"set -eu\n{LOOK}{BEGIN.format(number)}{loop.replace(LOOP, f'for i in {number};')}")
            for number, (home, pi) in enumerate(zip(homes, pis, strict=True))
        ]
        for done in running:
            done.result()
    for number, home in enumerate(homes):
        run_here(work, BEGIN.format(number))
        apart = distance(home / "two-steps.safetensors", work / "two-steps.safetensors")
        say(f"{home.name}: two steps apart from this machine's by {apart:.1e} of the change")
        expect(apart < APART, f"two steps within {APART} of this machine's", apart)
        (update,) = home.glob("pi-update-*.safetensors")
        shutil.copy(update, work)


def use(work: Path, home: Path, pi: Run) -> None:
    """Have a Pi measure round 1, and predict by the folded model, and hold both against what this machine does."""
    for name in ("mobilenet-1.safetensors", "mobilenet.onnx"):
        shutil.copy(work / name, home)
    results = []
    for run in (pi, run_here):
        run(home, f"set -eu\n{MEASURE.format(home.name[-1])}")
        results.append((read_json(home / "measured.json")["loss"], np.load(home / "predicted.npz")["predicted"]))
    (found, labels), (expected, labels_here) = results
    apart, same = relative([found], [expected]), float(np.mean(labels == labels_here))
    say(f"{home.name}: round 1 has a loss apart from this machine's by {apart:.1e}, {same:.1%} of the same predictions")
    expect(apart < TOLERANCE, f"a loss within {TOLERANCE} of this machine's", apart)
    expect(same > 0.99, "the predictions of this machine", same)


def accuracy(work: Path, weights: str) -> float:
    """Accuracy of weights on data that no client has."""
    printed = fedpara(work, f"evaluate mobilenet --weights {weights}.safetensors --data data/test.npz --json")
    return float(json.loads(printed)["accuracy"])


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    with new_folder(where) as folder:
        follow(folder, where)
