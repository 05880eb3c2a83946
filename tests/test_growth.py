"""Runs that grow: to the metrics of one that was made at once, and in no other way than by rounds, arms and seeds."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from journal_lines import NEEDED
from small_net import without_verification
from tiny_plan import measured, write_data

from export import make_bundle
from fedpara_edge.errors import InputError
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.simulation import runner
from fedpara_edge.simulation.folder import RunFolder, open_run
from fedpara_edge.simulation.metrics import Journal
from fedpara_edge.simulation.runner import simulate

HEAD = """
name = "tiny"
rounds = {rounds}
seeds = {seeds}
participants = 2
evaluate_every = 3
[data]
path = "data.npz"
split = "iid"
clients = 3
{data}
[model]
name = "mlp"
classes = 3
gamma = 0.5
input_shape = [1, 4, 4]
[train]
batch_size = 8
lr = 0.03
"""
OWN, COMMON = "test_share = 0.3", 'test = ["x_test", "y_test"]'
SMALL = """
[arms.small]
train.codec = "int8"
aggregate.algorithm = "fedavgm"
aggregate.downlink_codec = "int4"
"""
ALONE = """
[arms.alone]
local_only = true
"""
WILD = """
[arms.wild]
train.lr = 1e30
"""
SCAFFOLD = """
[arms.scaffold]
rounds = 5
train.algorithm = "scaffold"
aggregate.algorithm = "scaffold"
"""
PERSONAL = """
[arms.personal]
model.kind = "pfedpara"
"""


def write(
    place: Path,
    *arms: str,
    rounds: int = 2,
    seeds: tuple[int, ...] = (4,),
    data: str = OWN,
    changes: tuple[tuple[str, str], ...] = (),
) -> Path:
    """A plan, beside its data."""
    place.mkdir(exist_ok=True)
    if not (place / "data.npz").exists():
        write_data(place)
    text = HEAD.format(rounds=rounds, seeds=list(seeds), data=data) + "".join(arms)
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (place / "plan.toml").write_text(text)
    return place / "plan.toml"


@pytest.fixture
def _with_few_exports(in_this_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001
    """Equal recipes are exported once, as that is slow."""
    made: dict[str, Path] = {}

    def make_model(recipe: Recipe, folder: Path) -> None:
        if str(recipe) not in made:
            made[str(recipe)] = tmp_path / f"bundle-{len(made)}"
            with without_verification():
                make_bundle(recipe, made[str(recipe)])
        shutil.copytree(made[str(recipe)], folder)

    monkeypatch.setattr(runner, "make_model", make_model)


@dataclass(frozen=True)
class Steps:
    """A run in steps, and what it is in the end."""

    first: Callable[[Path], Path]
    more: tuple[Callable[[Path], Path], ...]


GROWING: dict[str, Steps] = {
    "own test shares": Steps(
        lambda place: write(place, ALONE, SMALL, WILD),
        (
            lambda place: write(place, ALONE, SMALL, SCAFFOLD, WILD, rounds=3),
            lambda place: write(place, SCAFFOLD, SMALL, PERSONAL, ALONE, WILD, rounds=4),
            lambda place: write(place, SCAFFOLD, SMALL, PERSONAL, ALONE, WILD, rounds=4, seeds=(5, 4)),
        ),
    ),
    "a common test set": Steps(
        lambda place: write(place, SMALL, ALONE, data=COMMON),
        (lambda place: write(place, SMALL, ALONE, SCAFFOLD, rounds=4, seeds=(4, 5), data=COMMON),),
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("_with_few_exports")
@pytest.mark.parametrize("name", GROWING)
def test_a_run_that_grew_has_the_metrics_of_one_made_at_once(name: str, tmp_path: Path) -> None:
    run = partial(simulate, most_rank_operations=0)  # so that ranks are of the last round alone
    steps, place = GROWING[name], tmp_path / "plan"
    run(steps.first(place), tmp_path / "grown")
    ends = [line for line in measured(tmp_path / "grown") if line["event"] == "round" and line["round"] == 2]
    assert ends
    assert all(line["loss"] is not None and line["ranks"] for line in ends)
    for step in steps.more:
        plan = step(place)
        outcomes = run(plan, tmp_path / "grown")
    assert (tmp_path / "grown" / "plan.toml").read_text() == plan.read_text()
    assert run(plan, tmp_path / "once") == outcomes
    assert measured(tmp_path / "grown") == measured(tmp_path / "once")
    ranks = {line["round"] for line in measured(tmp_path / "grown") if line.get("ranks")}
    assert ranks == {4, 5}
    if name == "own test shares":
        assert [outcome.rounds for outcome in outcomes if outcome.arm == "wild"] == [0, 0]
        evaluated = {line["round"] for line in measured(tmp_path / "grown") if line["event"] == "clients"}
        assert evaluated == {3, 4, 5}


@pytest.mark.usefixtures("_with_few_exports")
def test_what_was_not_asked_for_is_left_unfinished_until_it_is(tmp_path: Path) -> None:
    place, run = tmp_path / "plan", tmp_path / "run"
    simulate(write(place, SMALL, ALONE), run)
    plan = write(place, SMALL, ALONE, rounds=3)
    assert [outcome.arm for outcome in simulate(plan, run, arms=["alone"])] == ["alone"]
    assert [line["arm"] for line in measured(run) if line["event"] == "done"] == ["alone"]
    assert [outcome.rounds for outcome in simulate(plan, run)] == [3, 3]
    simulate(plan, tmp_path / "once")
    assert measured(run) == measured(tmp_path / "once")


@pytest.mark.slow
@pytest.mark.usefixtures("_with_few_exports")
def test_what_was_refused_can_be_corrected_or_given_up(tmp_path: Path) -> None:
    place, run = tmp_path / "plan", tmp_path / "run"
    simulate(write(place, SMALL), run)
    before = measured(run)
    wrong = write(place, SMALL, ALONE, rounds=3, changes=(("local_only = true", "train.warmup_steps = 99"),))
    with pytest.raises(InputError, match=r"arms\.alone.*warmup_steps: expected fewer than the"):
        simulate(wrong, run)
    assert measured(run) == before, "nothing is taken back before it is sure that the run goes on"
    simulate(write(place, SMALL), run)
    assert measured(run) == before
    plan = write(place, SMALL, ALONE, rounds=3)
    simulate(plan, run)
    simulate(plan, tmp_path / "once")
    assert measured(run) == measured(tmp_path / "once")


@pytest.mark.usefixtures("_with_few_exports")
def test_a_run_without_its_files_can_not_go_on(tmp_path: Path) -> None:
    place, run = tmp_path / "plan", tmp_path / "run"
    simulate(write(place, SMALL), run)
    shutil.rmtree(run / "work")
    with pytest.raises(InputError, match=r"small/seed-4: expected the files of the 2 rounds .* found them removed"):
        simulate(write(place, SMALL, rounds=3), run)
    assert len(simulate(write(place, SMALL), run)) == 1, "what is finished is finished"


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run with two arms, one of which has not begun, and with three seeds, one finished and one diverged."""
    run = tmp_path / "run"
    (run / "work").mkdir(parents=True)
    shutil.copy(write(tmp_path / "plan", SMALL, ALONE, rounds=6, seeds=(4, 5, 6, 7)), run)
    journal = Journal(run / "metrics.jsonl")
    for seed, rounds, end in ((4, 6, None), (5, 3, "diverged"), (6, 2, "not yet")):
        who = {"arm": "small", "seed": seed}
        journal.append({"event": "arm", **who, **NEEDED["arm"]})
        for number in range(1, rounds + 1):
            journal.append({"event": "round", **who, "round": number, **NEEDED["round"]})
        if end != "not yet":
            journal.append({"event": "done", **who, "rounds": rounds, "diverged": end})
    return run


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a rate": (
        {"changes": (("lr = 0.03", "lr = 0.2"),)},
        "train.lr: expected 0.03, found 0.2, and this run has 6 rounds of the former; a run grows by rounds, arms and",
    ),
    "a key less": ({"changes": (("lr = 0.03", ""),)}, "train.lr: expected 0.03, found no such key, and this run has 6"),
    "a key of an arm": (
        {"changes": (('"int4"', '"int8"'),)},
        "arms.small.aggregate.downlink_codec: expected 'int4', found 'int8', and",
    ),
    "participants": (
        {"changes": (("participants = 2", "participants = 3"),)},
        "participants: expected 2, found 3, ",
    ),
    "data": ({"data": COMMON}, "data.test: expected no such key, found "),
    "evaluate_every": ({"changes": (("every = 3", "every = 2"),)}, "evaluate_every: expected 3, found 2, and this run"),
    "the name": ({"changes": (('"tiny"', '"other"'),)}, "name: expected 'tiny', found 'other', and"),
    "fewer rounds": (
        {"rounds": 5},
        "rounds: expected at least 6, as this run has 6 rounds of arm small with seed 4, found 5",
    ),
    "fewer rounds of an arm": (
        {"changes": (("[arms.small]", "[arms.small]\nrounds = 3"),)},
        "arms.small.rounds: expected at least 6, as this run has 6 rounds of arm small with seed 4, found 3",
    ),
    "an arm less": ({"arms": (ALONE,)}, "arms.small: expected this arm, which this run has begun, found none"),
    "a seed less": (
        {"seeds": (4, 6, 7, 8)},
        "seeds: expected 5 among them, which this run has begun, found [4, 6",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_differences_are_refused_by_name(case: str, begun: Path, tmp_path: Path) -> None:
    changes, expected = REFUSED[case]
    before = {path: path.read_bytes() for path in begun.iterdir() if path.is_file()}
    options = {"arms": (SMALL, ALONE), "rounds": 6, "seeds": (4, 5, 6, 7), **changes}
    plan = write(tmp_path / "plan", *options.pop("arms"), **options)
    with pytest.raises(InputError) as refused, open_run(begun, plan):
        pass
    assert str(refused.value).startswith(f"{plan}: {expected}")
    assert str(refused.value).endswith("take another folder for another plan")
    assert {path: path.read_bytes() for path in begun.iterdir() if path.is_file()} == before


def test_an_arm_that_no_plan_can_have_is_named_in_one_line(begun: Path, tmp_path: Path) -> None:
    Journal(begun / "metrics.jsonl").append({"event": "arm", "arm": "two\nlines", "seed": 4, **NEEDED["arm"]})
    plan = write(tmp_path / "plan", SMALL, ALONE, rounds=6, seeds=(4, 5, 6, 7))
    with pytest.raises(InputError) as refused, open_run(begun, plan):
        pass
    assert str(refused.value).startswith(
        f"{plan}: arms.'two\\nlines': expected this arm, which this run has begun, found"
    )


def test_an_arm_that_would_have_all_others_evaluated_on_other_examples_is_refused(tmp_path: Path) -> None:
    place, run, both = tmp_path / "plan", tmp_path / "run", f"{COMMON}\n{OWN}"
    (run / "work").mkdir(parents=True)
    shutil.copy(write(place, SMALL, data=both), run)
    Journal(run / "metrics.jsonl").append({"event": "arm", "arm": "small", "seed": 4, **NEEDED["arm"]})
    expected = "arms: expected arms with which all are evaluated on the common test set as .*clients' own test shares"
    with pytest.raises(InputError, match=expected), open_run(run, write(place, SMALL, PERSONAL, data=both)):
        pass
    with open_run(run, write(place, SMALL, SCAFFOLD, data=both)):
        pass


def folders(run: Path) -> Iterator[str]:
    return (path.parent.relative_to(run / "work").as_posix() for path in run.rglob("made"))


def test_what_has_not_begun_may_change_and_is_made_again(begun: Path, tmp_path: Path) -> None:
    folder = RunFolder(begun)
    paths = [folder.data(4), folder.data(7), folder.job("small", 4).path, folder.job("small", 7).path]
    for path in [*paths, folder.job("alone", 4).path]:
        path.mkdir(parents=True)
        (path / "made").touch()
    place = tmp_path / "plan"
    other = (("local_only = true", "rounds = 1\ntrain.lr = 0.5"),)
    plan = write(place, SMALL, ALONE, SCAFFOLD, rounds=7, seeds=(6, 5, 4), changes=other)
    with open_run(begun, plan) as run:
        assert run.plan.read_text() == plan.read_text()
    assert set(folders(begun)) == {".data/seed-4", "small/seed-4"}
    with open_run(begun, write(place, SMALL, rounds=6, seeds=(4, 5, 6))):
        pass
    assert [json.loads(line)["seed"] for line in (begun / "metrics.jsonl").read_text().splitlines()][-1] == 6


def test_rounds_of_what_was_cut_short_may_be_fewer_than_planned(begun: Path, tmp_path: Path) -> None:
    kept = [line for line in Journal(begun / "metrics.jsonl").events if line["seed"] == 6]
    (begun / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    place = tmp_path / "plan"
    fewer = write(place, SMALL, rounds=2, seeds=(6,))
    with pytest.raises(InputError, match="expected at least 3, as this run has 2 rounds"), open_run(begun, fewer):
        pass
    with open_run(begun, write(place, SMALL, rounds=3, seeds=(6,))):
        pass
    # All its rounds, but not yet its end: as many are as good as more.
    last = {"event": "round", "arm": "small", "seed": 6, "round": 3, **NEEDED["round"]}
    Journal(begun / "metrics.jsonl").append(last)
    with open_run(begun, write(place, SMALL, ALONE, rounds=3, seeds=(6,))):
        pass
