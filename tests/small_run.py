"""Run folders as a simulation leaves them, of made-up metrics."""

import json
from pathlib import Path
from typing import Any

from fedpara_edge.report.results import read_results
from fedpara_edge.report.summarizing import summarize
from fedpara_edge.report.summary import Summary

RISING = [0.2, 0.5, 0.8, 0.8, 0.8]
"""Its smooth curve is 0.2, 0.5, 0.7, 0.8, 0.8."""


def write_plan(run: Path, arms: list[str], **settings: Any) -> None:
    run.mkdir(exist_ok=True)
    values = {"name": "small", "rounds": 5, "seeds": [0], **settings}
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    text += '[data]\npath = "none.npz"\nclients = 4\ntest = ["x_test", "y_test"]\n[model]\nname = "mlp"\n'
    text += "".join(f'[arms."{name}"]\nmodel.kind = "{"dense" if name == "dense" else "fedpara"}"\n' for name in arms)
    (run / "plan.toml").write_text(text, encoding="utf-8")


def write_metrics(run: Path, lines: list[dict[str, Any]], *, torn: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")


def lines_of(
    arm: str, accuracies: list[float | None], *, seed: int = 0, up: int = 30, down: int = 70, **about: Any
) -> list[dict[str, Any]]:
    """All lines of one arm and seed: so many bytes a round by two participants, 1.5 s of computing."""
    who = {"arm": arm, "seed": seed}
    first = {"event": "arm", **who, "model": "mlp", "kind": "dense" if arm == "dense" else "fedpara", "gamma": 0.1}
    first |= {"shared_parameters": 40, "dense_parameters": 400, "clients": 4, "participants": 2, "local_only": False}
    sent = {"up_bytes": up, "down_bytes": down, "participants": 2}
    rounds = [
        {"event": "round", **who, "round": number, "accuracy": accuracy, "train_seconds": 1.5, **sent}
        for number, accuracy in enumerate(accuracies, start=1)
    ]
    done = {"event": "done", **who, "rounds": len(rounds), "seconds": 1.0, "diverged": None}
    return [first | about, *rounds, done]


def full_lines(arm: str, seed: int, rounds: int = 4) -> list[dict[str, Any]]:
    """All lines of an arm and seed, with every measure."""
    lines = lines_of(
        arm, [0.3 + 0.1 * n + 0.01 * seed for n in range(rounds)], seed=seed, full_ranks={"a<b>": 16, "c": 8}
    )
    for line in lines:
        if line["event"] == "round":
            number = line["round"]
            line |= {"gap": 0.01 * number, "factor_norm": 3.0 + number, "weight_norm": 5.0 + number}
            line |= {"ranks": {"a<b>": 16, "c": 4} if arm != "dense" else None}
    clients = {f"client-{n}": {"accuracy": 0.1 * n + 0.5, "loss": 1.0, "examples": 9} for n in range(5)}
    return [
        *lines[:-2],
        {"event": "clients", "arm": arm, "seed": seed, "round": rounds, "clients": clients},
        *lines[-2:],
    ]


def summary_of(run: Path) -> Summary:
    return summarize(read_results(run))


def write_run(run: Path) -> Path:
    """A finished run of two arms with two seeds."""
    write_plan(run, ["dense", "small"], seeds=[0, 1], rounds=4)
    write_metrics(run, [line for arm in ("dense", "small") for seed in (0, 1) for line in full_lines(arm, seed)])
    return run
