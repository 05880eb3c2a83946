"""Advice: the setting that costs the fewest bytes to within some points of the dense model's accuracy.

First each kind and γ, and the dense model, gets the learning rate that is best for it in float32, by loss, which tells
more than accuracy after few rounds. Then every one of them is tried with every codec at that rate: ahead are settings
close to the dense model after as many rounds, those with fewer bytes first. Close are the points asked for after all
rounds, and as many times more after fewer. What is left in the end is compared by the bytes until the accuracy is
reached, as in the report (`fedpara_edge.report.summarizing`). A seed that the plan doesn't use decides clients, weights
and order, so that the plan's own seeds can judge the advice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.advising.choices import Choices
from fedpara_edge.advising.search import PLAN, Search, Standing
from fedpara_edge.advising.setting import Setting
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.report.results import read_results
from fedpara_edge.report.summarizing import summarize
from fedpara_edge.report.summary import Summary
from fedpara_edge.simulation.plan.plan import Tables, read_plan, read_tables
from fedpara_edge.simulation.runner import OnTrained
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.locking import make_folder
from fedpara_edge.storage.tomlfile import toml_text
from fedpara_edge.storage.wholefile import real_path

ADVISED = "advised.toml"
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates to try, over the plan's."""
LEFT = 3
"""Settings with codecs that are run for all rounds."""


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A setting that was run for all rounds.

    Attributes:
        setting: Setting that was run.
        accuracy: Accuracy after the last round.
        round_bytes: Bytes of all participants together in a round, up and down, mean over the rounds.
        bytes: Bytes until the accuracy was reached; None if it was not.
        ratio: Bytes of the dense model in float32 over these; None where either is None.
    """

    setting: Setting
    accuracy: float
    round_bytes: float
    bytes: float | None
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What a search has found.

    Attributes:
        target: Accuracy to reach: the dense model's best less the points.
        finalists: Settings that were run for all rounds: those that reached the target by bytes, then the others by
            accuracy.
        plan: Plan with the dense model and the advised setting, for the seeds of the user's plan; None where no
            setting but the dense model in float32 reached the target.
    """

    target: float
    finalists: tuple[Finalist, ...]
    plan: Path | None

    @property
    def best(self) -> Finalist:
        """The cheapest setting that reached the target."""
        return self.finalists[0]


def advise(
    plan: Path | str,
    folder: Path | str,
    *,
    choices: Choices | None = None,
    workers: int | None = None,
    on_rung: Callable[[str, int, int], None] = lambda _, __, ___: None,
    on_trained: OnTrained = lambda _: None,
) -> Advice:
    """Search for the cheapest setting of a plan, or go on with a search that was interrupted.

    Args:
        plan: Plan file, whose data, model and options are those of all settings; its arms are left aside.
        folder: Folder of the search, new or that of an earlier search of this plan.
        choices: Settings to choose among; None for the defaults.
        workers: Number of worker processes; None for as many as there are cores.
        on_rung: Function that is called with the subject, the number of settings and their rounds.
        on_trained: Function that is called with the name of a setting after each training.

    Raises:
        InputError: The plan does not fit, its model has no accuracy, or the folder's run is of another plan.
        FedparaError: The dense model diverged at every rate.
    """
    plan, folder = Path(plan), Path(folder)
    choices = choices or Choices()
    found, tables = read_plan(plan), _anywhere(read_tables(plan), real_path(plan.parent))
    make_folder(folder, kind="a folder for the search")
    if any(folder.iterdir()) and not (folder / PLAN).exists():
        raise InputError(f"{folder}: expected a new folder or that of an earlier search, found another; choose another")
    seed = next(number for number in itertools.count() if number not in found.seeds)

    def searching(what: str) -> Search:
        return Search(
            plan=found,
            tables=tables,
            folder=folder,
            seed=seed,
            workers=workers,
            on_rung=lambda count, rounds: on_rung(what, count, rounds),
            on_trained=on_trained,
        )

    tuning = searching("learning rates")
    lr = found.arms[0].train.lr if "lr" not in tables.get("train", {}) else float(tables["train"]["lr"])
    tried = [float(f"{factor * lr:.3g}") for factor in RATES]
    of_families = [[Setting(family=family, lr=rate) for rate in tried] for family in choices.families]
    best = [group[0] for group in tuning.halve(of_families, lambda standing, _: standing.loss)]
    dense, tuned = best[0], [standing.setting for standing in best if standing.accuracy is not None]
    if dense.accuracy is None:
        rates = ", ".join(f"{rate:g}" for rate in tried)
        raise FedparaError(
            f"{plan}: expected the dense model to train at one of the rates {rates}, found that it diverges at all; "
            "lower train.lr"
        )
    with_codecs = [
        Setting(family=setting.family, lr=setting.lr, codec=codec)
        for setting, codec in itertools.product(tuned, (None, *choices.codec))
    ]
    search = searching("kinds, sizes and codecs")
    reference = {rounds: search.after(rounds, [dense.setting])[0].accuracy or 0.0 for rounds in search.rungs}
    margin = choices.points / 100

    def cost(standing: Standing, rounds: int) -> tuple[float, ...]:
        return _cost(standing, reference[rounds] - margin * found.rounds / rounds)

    left = [standing.setting for standing in search.halve([with_codecs], cost, least=LEFT)[0]]
    return _advice(tables, folder, search.run, dense.setting, left, margin)


def _cost(standing: Standing, target: float) -> tuple[float, ...]:
    """Rank by bytes of those that have come as far as the target, and of the others, behind them, by accuracy."""
    is_close = standing.accuracy is not None and standing.accuracy >= target
    return (0, standing.bytes) if is_close else (1, *standing.shortfall)


def _advice(tables: Tables, folder: Path, run: Path, dense: Setting, left: Sequence[Setting], margin: float) -> Advice:
    summary = summarize(read_results(run))
    curve = summary.arm(dense.name).accuracy
    if curve is None:
        raise FedparaError(f"{run}: expected accuracies of {dense.name}, found none; remove {folder} and search again")
    target = curve.best - margin
    finalists = [_finalist(summary, setting, dense, target) for setting in dict.fromkeys([*left, dense])]
    ranked = sorted(finalists, key=lambda each: (each.bytes is None, each.bytes or -each.accuracy))
    path = None
    if ranked[0].setting != dense:
        path = folder / ADVISED
        arms = {"dense": dense, "advised": ranked[0].setting}
        drawn = "pretrained" not in tables.get("model", {})
        advised = {**tables, "arms": {name: setting.table(drawn=drawn) for name, setting in arms.items()}}
        with replacing_file(path) as temporary:
            temporary.write_text(toml_text(advised), encoding="utf-8")
    return Advice(target=target, finalists=tuple(ranked), plan=path)


def _finalist(summary: Summary, setting: Setting, dense: Setting, target: float) -> Finalist:
    arm = summary.arm(setting.name)
    reached, of_dense = summary.reached(arm, target), summary.reached(summary.arm(dense.name), target)
    sent = None if reached is None else reached.bytes
    ratio = of_dense.bytes / sent if sent and of_dense is not None and of_dense.bytes else None
    accuracy = arm.accuracy.mean[-1] if arm.accuracy is not None else 0.0
    return Finalist(
        setting=setting, accuracy=float(accuracy), round_bytes=arm.round_bytes or 0.0, bytes=sent, ratio=ratio
    )


def _anywhere(tables: Tables, folder: Path) -> dict[str, Any]:
    """Tables of a plan without its arms, with paths that hold from any folder."""
    common: dict[str, Any] = {key: value for key, value in tables.items() if key not in ("arms", "reference")}
    data, model = dict(common["data"]), dict(common.get("model", {}))
    data["path"] = str(folder / data["path"])
    for key in ("pretrained", "example"):
        if key in model:
            model[key] = str(folder / model[key])
    where, _, factory = str(model.get("name", "")).rpartition(":")
    if where.endswith(".py"):
        model["name"] = f"{folder / where}:{factory}"
    return {**common, "data": data, "model": model}
