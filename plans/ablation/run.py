"""Run many small variations of a plan's federation at once, and write what they reach as JSON lines.

    python plans/ablation/run.py STAGE -o plans/ablation/results.jsonl --device cuda --seconds 300

A stage is a list of settings in `stages.py`; those that the file has already are left out.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import click  # noqa: E402
import network  # noqa: E402
import torch  # noqa: E402
from federation import Batch  # noqa: E402
from images import Data, Images  # noqa: E402
from stages import STAGES  # noqa: E402
from variations import Setting, Structure  # noqa: E402

from fedpara_edge.simulation.plan.plan import read_plan  # noqa: E402


def differing(setting: Setting) -> dict[str, object]:
    """Options of a setting that are not the default."""
    plain = asdict(Setting(lr=0.0))
    return {name: value for name, value in asdict(setting).items() if value != plain[name]}


Common = tuple[str, Structure, int]
"""Plan, structure and rounds, which the runs of a batch have in common."""
Runs = list[tuple[Setting, int]]
"""Setting and seed of each run."""


def key(plan: str, structure: Structure, setting: Setting, *numbers: int) -> str:
    """Text that tells a run from others, by its rounds and its seed too."""
    return json.dumps([plan, asdict(structure), asdict(setting), *numbers])


@click.command()
@click.argument("stages", nargs=-1, type=click.Choice(sorted(STAGES)), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File of JSON lines to add to.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seconds", type=float, default=1e9, help="Time after which no batch of runs begins.")
@click.option("--runs", "most", default=24, show_default=True, help="Runs of a batch.")
@click.option("--data", "paths", multiple=True, type=(str, Path), help="File of a plan's data, if elsewhere.")
@click.option("--tests", default=5000, show_default=True, help="Test examples.")
@click.option("--compiled/--eager", default=False, help="Whether kernels are fused, on a GPU.")
@click.option("--padded", is_flag=True, help="Pad images to 32x32, so that all plans have the same kernels.")
def main(
    stages: tuple[str, ...],
    output: Path,
    device: str,
    seconds: float,
    most: int,
    paths: tuple[tuple[str, Path], ...],
    tests: int,
    compiled: bool,
    padded: bool,
) -> None:
    """Run the settings of some stages."""
    started = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = True
    batches = batches_of(stages, done_in(output), most)
    data = {}
    for plan in dict.fromkeys(plan for (plan, _, _), _ in batches):
        read = read_plan(HERE.parent / f"{plan}.toml")
        seeds = sorted({seed for common, runs in batches if common[0] == plan for _, seed in runs})
        source = replace(read.data, path=dict(paths).get(plan, read.data.path))
        images = Images(mean=read.arms[0].model.mean, std=read.arms[0].model.std, padded=padded)
        batch_size = read.arms[0].train.batch_size
        data[plan] = Data(source, seeds, images, torch.device(device), batch_size=batch_size, tests=tests)
    say(started, f"{len(batches)} batches")
    for number, (common, runs) in enumerate(batches):
        plan, structure, rounds = common
        if time.monotonic() - started > seconds:
            say(started, f"no time for {structure}, {len(runs)} runs")
            continue
        filled = runs + [runs[0]] * (most - len(runs)) if compiled else runs  # fused kernels are of one size
        if compiled and number == 0:
            probe(structure, filled, data[plan], started)
        began = time.monotonic()
        batch = Batch(structure, filled, data[plan], rounds)
        found = batch.run(tuple(sorted({rounds // 2, rounds - 2, rounds} - {0})))[: len(runs)]
        with output.open("a", encoding="utf-8") as file:
            for (setting, seed), measures in zip(runs, found, strict=True):
                about = {"plan": plan, "seed": seed, "rounds": rounds, "numbers": batch.numbers}
                about |= {"structure": asdict(structure), "setting": asdict(setting)}
                file.write(json.dumps({**about, **measures}) + "\n")
        say(started, f"{plan}, {structure}: {len(runs)} runs in {time.monotonic() - began:.1f} s")


def done_in(output: Path) -> set[str]:
    """Keys of the runs that a file has."""
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    results = map(json.loads, lines)
    return {
        key(r["plan"], Structure(**r["structure"]), Setting(**r["setting"]), r["rounds"], r["seed"]) for r in results
    }


def batches_of(stages: Sequence[str], done: set[str], most: int) -> list[tuple[Common, Runs]]:
    """Batches of runs that have not been done, in the order in which stages fill them."""
    waiting: dict[Common, Runs] = {}
    batches: list[tuple[Common, Runs]] = []
    for run in (run for stage in stages for run in STAGES[stage]):
        common = (run.plan, run.structure, run.rounds)
        for seed in run.seeds:
            if (text := key(run.plan, run.structure, run.setting, run.rounds, seed)) in done:
                continue
            done.add(text)
            waiting.setdefault(common, []).append((run.setting, seed))
            if len(waiting[common]) == most:
                batches.append((common, waiting.pop(common)))
    return [*batches, *waiting.items()]


def probe(structure: Structure, runs: Runs, data: Data, started: float) -> None:
    """Fuse what then computes the same, and faster.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    plain = dict(network.FAST)
    seconds, expected = _timed(structure, runs, data)
    say(started, f"plain: {seconds:.2f} s a round, losses {[round(loss, 4) for loss in expected[:4]]}")
    if not all(map(math.isfinite, expected)):
        raise FloatingPointError("a loss is not finite")
    network.compile_them()
    fused = dict(network.FAST)
    network.FAST.update(plain)
    for name, function in fused.items():
        before = network.FAST[name]
        network.FAST[name] = function
        try:
            found, losses = _timed(structure, runs, data)
        except Exception as error:  # noqa: BLE001  # of a compiler, which has no common base
            say(started, f"{name} failed: {type(error).__name__}: {str(error)[:500]}")
            network.FAST[name] = before
            continue
        is_right = all(abs(one - other) < 0.02 * other for one, other in zip(losses, expected, strict=True))
        say(
            started,
            f"{name} fused: {found:.2f} s a round, losses {[round(loss, 4) for loss in losses[:4]]}: {is_right}",
        )
        if is_right and found < seconds:
            seconds = found
        else:
            network.FAST[name] = before
    say(started, f"memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def _timed(structure: Structure, runs: Runs, data: Data) -> tuple[float, list[float]]:
    """Seconds of a second round, and the mean losses of the runs in it."""
    batch, seconds = Batch(structure, runs, data, 2), 0.0
    for number in range(2):
        torch.cuda.synchronize()
        began = time.monotonic()
        batch.aggregate(batch.train(number), number)
        torch.cuda.synchronize()
        seconds = time.monotonic() - began
    return seconds, batch.train_loss.tolist()


def say(started: float, text: str) -> None:
    """Print with the seconds since the start."""
    print(f"{time.monotonic() - started:.0f} s: {text}", flush=True)


if __name__ == "__main__":
    main()
