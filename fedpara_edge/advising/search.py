"""The search: settings run side by side for a few rounds, and those that promise most for more.

Successive halving (Jamieson and Talwalkar, AISTATS 2016): all settings get a ninth of the rounds, the better third of
them a third, and the best of those all rounds. A run grows (`fedpara_edge.simulation.growth`), so that no round is
computed twice, and a search that was interrupted goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.advising.setting import Setting
from fedpara_edge.errors import InputError
from fedpara_edge.report.results import SeedRun, read_results
from fedpara_edge.simulation.plan.plan import Plan, Tables, read_plan, read_tables
from fedpara_edge.simulation.runner import OnTrained, simulate
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.tomlfile import toml_text

SHRINKAGE = 3
"""Factor by which settings become fewer, and rounds more, from one rung to the next."""
RUNGS = 3
PLAN, RUN = "search.toml", "run"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a setting has come to after some rounds.

    Attributes:
        setting: Setting that was run.
        accuracy: Accuracy after those rounds, or after the last evaluation before; None if the training diverged.
        loss: Loss of the same evaluation; infinite if it is not finite.
        bytes: Bytes of all participants together until then, up and down.
    """

    setting: Setting
    accuracy: float | None
    loss: float
    bytes: int

    @property
    def shortfall(self) -> tuple[float, float]:
        """By how much it falls short, to compare with that of others: accuracy first, and loss where that is level."""
        return (math.inf if self.accuracy is None else -self.accuracy), self.loss


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search in a folder, which holds the plan of what was tried and its run.

    Args:
        plan: Plan of the user, whose arms are left aside.
        tables: Tables of that plan for every arm, with paths that hold from anywhere.
        folder: Folder of the search.
        seed: Seed of all federations.
        workers: Number of worker processes; None for as many as there are cores.
        on_rung: Function that is called with the number of settings and rounds before each rung.
        on_trained: Function that is called with the name of an arm after each training.
    """

    plan: Plan
    tables: Tables
    folder: Path
    seed: int
    workers: int | None = None
    on_rung: Callable[[int, int], None] = lambda _, __: None
    on_trained: OnTrained = lambda _: None

    @property
    def run(self) -> Path:
        """Run folder of everything that was tried."""
        return self.folder / RUN

    @property
    def rungs(self) -> tuple[int, ...]:
        """Rounds of each rung, ascending; the last are those of the plan.

        >>> from types import SimpleNamespace
        >>> Search(plan=SimpleNamespace(rounds=30), tables={}, folder=Path(), seed=0).rungs
        (3, 10, 30)
        """
        rounds = (max(1, round(self.plan.rounds / SHRINKAGE**rung)) for rung in reversed(range(RUNGS)))
        return tuple(dict.fromkeys(rounds))

    def halve(
        self, groups: Sequence[Sequence[Setting]], cost: Callable[[Standing, int], Any], *, least: int = 1
    ) -> list[list[Standing]]:
        """Run groups of settings rung by rung, of each of which a third is left each time.

        Args:
            groups: Settings that are compared with each other.
            cost: Function of a standing and the rounds of the rung: the smaller the result, the better.
            least: Number of settings of a group that are left at the last rung, if it has as many.

        Returns:
            Standings of those of each group that were run for all rounds, the best first.
        """
        left = [list(group) for group in groups]
        ranked: list[list[Standing]] = []
        for number, rounds in enumerate(self.rungs):
            if number:
                left = [group[: max(least, -(-len(group) // SHRINKAGE))] for group in left]
            self._run([setting for group in left for setting in group], rounds)
            ranked = [sorted(self.after(rounds, group), key=lambda each: cost(each, rounds)) for group in left]
            left = [[standing.setting for standing in group] for group in ranked]
        return ranked

    def after(self, rounds: int, settings: Sequence[Setting]) -> list[Standing]:
        """What settings that were run for as many rounds, or more, had come to after these.

        Raises:
            InputError: A setting has no accuracy.
        """
        measured = {arm.name: arm.seeds[0] for arm in read_results(self.run).arms}
        return [_standing(setting, measured[setting.name], rounds) for setting in settings]

    def _run(self, settings: Sequence[Setting], rounds: int) -> None:
        path, arms = self.folder / PLAN, dict[str, Any]()
        if path.exists():
            read_plan(path)  # so that what follows finds the tables of a plan
            arms = dict(read_tables(path)["arms"])
        for setting in settings:
            before = arms.get(setting.name, {}).get("rounds", 0)
            arms[setting.name] = {"rounds": max(rounds, before), **setting.table(drawn=self._may_draw)}
        with replacing_file(path) as temporary:
            temporary.write_text(toml_text({**self.tables, "seeds": [self.seed], "arms": arms}), encoding="utf-8")
        self.on_rung(len(settings), rounds)
        names = [setting.name for setting in settings]
        simulate(path, self.run, workers=self.workers, arms=names, on_trained=self.on_trained)

    @property
    def _may_draw(self) -> bool:
        return "pretrained" not in self.tables.get("model", {})


def _standing(setting: Setting, run: SeedRun, rounds: int) -> Standing:
    accuracies, losses = run.series("accuracy"), run.series("loss")
    if losses and not accuracies:
        raise InputError("expected a model whose evaluations have an accuracy, found none", key="model")
    sent: Mapping[int, int] = run.total_bytes()
    last = max((number for number in accuracies if number <= rounds), default=None)
    diverged = last is None or rounds not in sent
    return Standing(
        setting=setting,
        accuracy=None if diverged else accuracies[last or 0],
        loss=math.inf if diverged else losses.get(last or 0, math.inf),
        bytes=sent.get(rounds, 0),
    )
