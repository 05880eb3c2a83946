"""Make `docs/ablation.md` from `results.jsonl`.

python plans/ablation/table.py            # after more was run
python plans/ablation/table.py --check    # exits with 1 if the page differs from the results
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from variations import Setting, Structure

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "ablation.md"
INTRODUCTION = Path(__file__).with_name("introduction.md")
TITLES = {"cifar10-cnn": "CIFAR-10 (JPEG q75)", "fashion-mnist-cnn": "Fashion-MNIST, padded to 32x32"}
FACTORED = ("conv2", "conv3", "conv4")
"""Layers that have ranks."""
ARMS = {
    ("dense", (0, 0, 0)): "dense",
    ("lowrank", (12, 21, 36)): "low-rank, γ 0.1",
    ("fedpara", (8, 13, 22)): "FedPara, γ 0.1",
    ("fedpara", (12, 22, 41)): "FedPara, γ 0.3",
    ("fedpara", (8, 12, 16)): "FedPara, γ 0",
    ("matrix", (8, 12, 16)): "FedPara, matrix form, γ 0",
    ("update", (7, 11, 18)): "update, γ 0.1",
    ("update", (2, 3, 5)): "update, a quarter of the rank",
    ("update", (13, 24, 43)): "update, γ 0.3",
}
DEFAULTS = asdict(Setting(lr=0.0, decay=0.94))
WORDS = {
    "weight_decay": "weight decay {}",
    "momentum": "momentum {} of the clients",
    "frobenius": "Frobenius decay {}",
    "scale": "{} times the even scale",
    "how": "directions: {}",
    "masked": "no signs",
    "reset_every": "folded every {} rounds",
    "known": "half of the directions those of the last rounds' movement",
    "beta": "FedAvgM, β {}",
    "base_beta": "β {} on the base",
    "eta": "server's rate {}",
    "fedexp": "FedExP",
}


def rows() -> Iterator[tuple[str, str, Mapping[str, Any], Sequence[Mapping[str, Any]]]]:
    """Plan, arm, setting and results by seed."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        structure = Structure(**{**result["structure"], "ranks": tuple(result["structure"]["ranks"])})
        found[result["plan"], structure, Setting(**result["setting"]), result["rounds"]].append(result)
    for (plan, structure, setting, _), results in found.items():
        yield plan, title(structure), asdict(setting), results


def title(structure: Structure) -> str:
    """Name of an arm."""
    factored = {name for name, rank in zip(FACTORED, structure.ranks, strict=True) if rank}
    likes = {like: name for (kind, like), name in ARMS.items() if kind == structure.kind}
    ranks = next(like for like in likes if all(rank in (0, of) for rank, of in zip(structure.ranks, like, strict=True)))
    dense = [name for name, rank in zip(FACTORED, ranks, strict=True) if rank and name not in factored]
    parts = {
        f"{structure.width} times the channels": structure.width > 1,
        f"{' and '.join(dense)} dense": bool(dense),
        f"dense for {structure.warm_up} rounds": structure.warm_up > 0,
        "SGD": structure.optimizer == "sgd",
        "preconditioned": structure.preconditioned,
        "one factor a round": structure.cyclic,
    }
    return ", ".join([likes[ranks], *(part for part, is_so in parts.items() if is_so)])


def options(setting: Mapping[str, Any]) -> str:
    """What a setting has beside its rate."""
    return "; ".join(words.format(setting[name]) for name, words in WORDS.items() if setting[name] != DEFAULTS[name])


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}" if len(values) > 1 else f"{100 * values[0]:.1f}"


def page() -> str:
    """The whole page."""
    parts: dict[str, dict[str, list[tuple[str, ...]]]] = defaultdict(lambda: defaultdict(list))
    for plan, name, setting, results in rows():
        last = [mean(list(result["accuracy"].values())[-2:]) for result in results]
        averages = [percent([result[f"average {decay}"] for result in results]) for decay in (0.5, 0.8)]
        cells = (f"{results[0]['numbers']:,}", f"{setting['lr']:g}", options(setting), percent(last), *averages)
        parts[plan][name].append(cells)
    text = [INTRODUCTION.read_text(encoding="utf-8")]
    for plan, arms in parts.items():
        text.append(f"## {TITLES[plan]}\n")
        text.append("| arm | numbers | rate | option | accuracy | average 0.5 | average 0.8 |")
        text.append("| :-- | --: | --: | :-- | --: | --: | --: |")
        order = [name for name in ARMS.values() if name in arms] + sorted(arms.keys() - set(ARMS.values()))
        text += [f"| {name} | {' | '.join(cells)} |" for name in order for cells in arms[name]]
        text.append("")
    return "\n".join(text)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if the page would change.")
def main(check: bool) -> None:
    """Make docs/ablation.md from the committed results, or check it."""
    new = page()
    if check and (not PAGE.exists() or PAGE.read_text(encoding="utf-8") != new):
        raise click.ClickException(f"{PAGE}: expected the results of {RESULTS.name}; run python {Path(__file__).name}")
    if not check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
