"""Run a plan on a GPU for as many seconds as there are, after a check of the GPU against the CPU.

    python plans/on_gpu.py plans/paper/cifar10-vgg16-dirichlet.toml -o /dev/shm/run --seconds 560

For a machine that is lent for minutes: bundles are made while the check runs, the metrics are copied to a folder again
and again, and the same command goes on where the run was stopped. If steps can't be recorded there, the kernels of each
are launched one by one, which is slower.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import click
import numpy as np

HERE = Path(__file__).resolve().parent
EVERY_S, ENDING_S, CHECK_S = 5.0, 25.0, 120.0
MAKE = """
import sys
from dataclasses import replace
from pathlib import Path
from export import make_bundle
from fedpara_edge.simulation.plan.plan import read_plan
plan, arm, seed, bundle = sys.argv[1:]
make_bundle(replace(read_plan(Path(plan)).arm(arm).model, seed=int(seed)), Path(bundle))
"""
SIMULATE = "import sys; from fedpara_edge.cli import main; main()"
LAUNCHING = "from fedpara_edge.simulation.torchengine.device import launch_each; launch_each(); "
CHECK = """
name = "check"
rounds = 2
seeds = [0]
[data]
path = "check.npz"
clients = 4
test = ["x_test", "y_test"]
[model]
name = "cnn"
[train]
epochs = 2
batch_size = 16
lr = 0.02
[arms.momentum]
model.kind = "dense"
model.momentum = 0.9
[arms.fedprox]
model.gamma = 0.3
train.algorithm = "fedprox:mu=0.1"
train.clip_norm = 1.0
train.codec = "int8"
[arms.adamw]
model.kind = "lowrank"
model.optimizer = "adamw"
train.lr = 0.002
"""
CLOSE = 1e-2


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for all that is made.")
@click.option("--seconds", type=float, required=True, help="Seconds from the start of this command to its end.")
@click.option("--metrics", type=click.Path(path_type=Path), help="Folder for copies of metrics and logs.")
@click.option("--arm", "arms", multiple=True, default=("dense", "fedpara", "lowrank"), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--evaluate-every", default=10, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--precision", default="tf32", show_default=True)
@click.option("--workers", default=16, show_default=True, help="Clients at a time.")
def main(
    plan: Path,
    output: Path,
    seconds: float,
    metrics: Path | None,
    arms: tuple[str, ...],
    seed: int,
    evaluate_every: int,
    device: str,
    precision: str,
    workers: int,
) -> None:
    """Check the device, and run some arms of PLAN on it until the time is up."""
    started = time.monotonic()
    output, told = output.resolve(), (metrics or output).resolve()
    for folder in (output, told):
        folder.mkdir(parents=True, exist_ok=True)
    run, mine = output / "run", output / "plan.toml"
    mine.write_text(adapted(plan, seed, evaluate_every))
    (run / "work").mkdir(parents=True, exist_ok=True)
    shutil.copy(mine, run / "plan.toml")
    making = make_bundles(mine, run, arms, seed, told)
    options = [*(f"--arm={arm}" for arm in arms), "--engine=torch", f"--device={device}", f"--workers={workers}"]
    records = check(output / "check", device, told)
    for arm, process in making.items():
        if process.wait():
            say(f"bundle of {arm}: failed, see {told}/bundle-{arm}.log")
    say(f"{time.monotonic() - started:.0f} s: begins")
    for attempt in range(2):
        left = seconds - (time.monotonic() - started) - ENDING_S
        code = simulate(mine, run, [*options, f"--precision={precision}"], left, told, records=records)
        if code in (0, 130) or attempt or left < 0:
            break
        say(f"ended with {code}, see {told}/simulate.log; again, with nothing recorded")
        records = False
    show(run / "metrics.jsonl", arms)


def say(text: str) -> None:
    print(text, flush=True)


def adapted(plan: Path, seed: int, evaluate_every: int) -> str:
    """Text of a plan for one seed, with fewer evaluations and its data where they are."""
    text = re.sub(r"(?m)^seeds = .*$", f"seeds = [{seed}]\nevaluate_every = {evaluate_every}", plan.read_text())
    return re.sub(r'(?m)^path = "(.*)"$', lambda found: f'path = "{(plan.parent / found[1]).resolve()}"', text)


def make_bundles(
    plan: Path, run: Path, arms: tuple[str, ...], seed: int, told: Path
) -> dict[str, subprocess.Popen[bytes]]:
    """Processes that make the bundles that are missing."""
    making = {}
    for arm in arms:
        bundle = run / "work" / arm / f"seed-{seed}" / "bundle"
        if not bundle.exists():
            bundle.parent.mkdir(parents=True, exist_ok=True)
            with (told / f"bundle-{arm}.log").open("w") as log:
                command = [sys.executable, "-c", MAKE, str(plan), arm, str(seed), str(bundle)]
                making[arm] = subprocess.Popen(command, stdout=log, stderr=log)
    return making


def check(folder: Path, device: str, told: Path) -> bool:
    """Compare a small plan on the device with the CPU, if that was not done; tell whether steps can be recorded."""
    if (folder / "done").exists():
        return json.loads((folder / "done").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_check(folder)
    started, logs, running = time.monotonic(), {}, {}
    for name in {"cpu": 0, device: 1}:
        logs[name] = (told / f"check-{name}.log").open("w")
        command = ["simulate", "check.toml", "-o", f"on-{name}", "--engine=torch", f"--device={name}", "--workers=3"]
        running[name] = start(SIMULATE, command, logs[name], folder)
    records = True
    for name, process in running.items():
        try:
            code = process.wait(max(1.0, CHECK_S - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        logs[name].close()
        say(f"check on {name}: ended with {code} after {time.monotonic() - started:.0f} s")
        log = (told / f"check-{name}.log").read_text()
        if log.strip():
            say(log[-2000:])
        records = records and (name == "cpu" or (code == 0 and "recording a step failed" not in log))
    found = [rounds(folder / f"on-{name}" / "metrics.jsonl") for name in running]
    for key in found[0]:
        losses = [each.get(key, {}).get("loss") for each in found]
        is_close = None not in losses and abs(losses[0] - losses[-1]) < CLOSE * abs(losses[0])
        say(f"check {key[0]} round {key[1]}: losses on cpu and {device}: {losses}: {'ok' if is_close else 'BAD'}")
    (folder / "done").write_text(json.dumps(records))
    return records


def write_check(folder: Path) -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 10, 700)
    x = generator.integers(0, 100, (700, 1, 28, 28))
    x[np.arange(700), 0, 2 * y, :] += 150
    x = x.astype(np.uint8)
    np.savez(folder / "check.npz", x=x[:400], y=y[:400], x_test=x[400:], y_test=y[400:])
    (folder / "check.toml").write_text(CHECK)


def start(code: str, arguments: list[str], log: TextIO, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=log, stderr=log, cwd=folder)


def simulate(plan: Path, run: Path, options: list[str], seconds: float, told: Path, *, records: bool) -> int:
    """Simulate until the time is up; return the exit code, 130 if that ended it."""
    deadline = time.monotonic() + seconds
    code = SIMULATE if records else LAUNCHING + SIMULATE
    with (told / "simulate.log").open("a") as log:
        process = start(code, ["simulate", str(plan.resolve()), "-o", str(run.resolve()), *options], log, Path.cwd())
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(EVERY_S)
            copy(run / "metrics.jsonl", told)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(ENDING_S - 5)
            except subprocess.TimeoutExpired:
                process.kill()
            say("the time is up")
            process.wait()
            copy(run / "metrics.jsonl", told)
            return 130
    copy(run / "metrics.jsonl", told)
    return process.returncode


def copy(file: Path, told: Path) -> None:
    if file.exists() and told != file.parent:
        shutil.copy(file, told)


def rounds(metrics: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Events of rounds by arm and number; lines that are not whole are left out."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return {(event["arm"], event["round"]): event for event in events if event["event"] == "round"}


def show(metrics: Path, arms: tuple[str, ...]) -> None:
    """Print what was measured."""
    for arm in arms:
        mine = [event for (name, _), event in rounds(metrics).items() if name == arm]
        accuracies = [f"{e['round']}: {e['accuracy']:.4f}" for e in mine if e["accuracy"] is not None]
        each = sum(e["seconds"] for e in mine) / max(1, len(mine))
        say(f"{arm}: {len(mine)} rounds, {each:.2f} s each; accuracy {', '.join(accuracies) or 'not yet'}")


if __name__ == "__main__":
    main()
