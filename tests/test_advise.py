"""Advice: the cheapest setting that comes as close to dense as was asked, from runs that grow and can be cut short."""

import json
import shutil
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_plan
from command_line import Command

from fedpara_edge.advising import advice, search
from fedpara_edge.advising.advice import Advice, advise
from fedpara_edge.advising.choices import DENSE, Choices
from fedpara_edge.advising.search import Search, Standing
from fedpara_edge.advising.setting import Setting
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.simulation import runner
from fedpara_edge.simulation.plan.plan import read_plan
from fedpara_edge.simulation.runner import simulate
from fedpara_edge.storage.tomlfile import toml_text

pytestmark = pytest.mark.slow

FEW = Choices(points=10, kind=("fedpara",), gamma=(0.5,), codec=("int8",))
RATES = (1e-6, 0.5)


@pytest.fixture(autouse=True)
def _few_rates(monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:  # noqa: ARG001
    monkeypatch.setattr(advice, "RATES", RATES)


class Searched(NamedTuple):
    folder: Path
    found: Advice

    def copy(self, place: Path) -> Path:
        shutil.copytree(self.folder, place, dirs_exist_ok=True)
        return place


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A finished search beside its plan; a test that spoils it makes itself a copy."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(advice, "RATES", RATES)
        patched.setattr(runner, "open_pool", lambda *_, **__: nullcontext(tiny_plan.AtOnce()))
        folder = tmp_path_factory.mktemp("search")
        return Searched(folder, search_in(folder))


def search_in(place: Path) -> Advice:
    learns = ("input_shape = [1, 4, 4]", "input_shape = [1, 4, 4]\nmean = [0.43]\nstd = [0.22]")
    plan = tiny_plan.write_plan(place, ("rounds = 2", "rounds = 9"), ("seeds = [4]", "seeds = [0, 4]"), learns)
    return advise(plan, place / "search", choices=FEW, workers=1)


def test_the_cheapest_within_the_points_is_advised(searched: Searched) -> None:
    found = searched.found
    by_name = {each.setting.name: each for each in found.finalists}
    dense = by_name["dense_lr0.05"]
    assert dense.ratio == 1
    assert dense.accuracy >= found.target > 0.5
    reached = [each.bytes for each in found.finalists if each.bytes is not None]
    assert reached == sorted(reached)
    assert all(each.bytes is None for each in found.finalists[len(reached) :])
    assert found.best.setting.codec == "int8"
    assert dense.bytes is not None
    assert found.best.bytes == min(reached) < dense.bytes / 2
    assert found.best.ratio == pytest.approx(dense.bytes / found.best.bytes)


def test_what_was_searched_is_a_run_on_a_seed_that_the_plan_does_not_use(searched: Searched) -> None:
    events = tiny_plan.measured(searched.folder / "search" / "run")
    assert {event["seed"] for event in events} == {1}
    rounds = {event["arm"]: event["rounds"] for event in events if event["event"] == "done"}
    assert rounds == {
        "dense_lr1e-07": 1,
        "fedpara-0.5_lr1e-07": 1,
        "dense_lr0.05": 9,
        "fedpara-0.5_lr0.05": 9,
        "dense_lr0.05_int8": 9,
        "fedpara-0.5_lr0.05_int8": 9,
    }


def test_the_advised_plan_is_for_the_seeds_of_the_plan(searched: Searched) -> None:
    assert searched.found.plan == searched.folder / "search" / "advised.toml"
    plan = read_plan(searched.found.plan)
    assert [arm.name for arm in plan.arms] == ["dense", "advised"]
    assert plan.seeds == (0, 4)
    assert plan.rounds == 9
    assert plan.arm("dense").model.kind == "dense"
    assert plan.arm("dense").train.lr == plan.arm("advised").train.lr == 0.05
    assert plan.arm("advised").train.codec == plan.arm("advised").aggregate.downlink_codec == "int8"
    assert plan.arm("advised").model.kind == searched.found.best.setting.family.kind
    assert plan.data.path == searched.folder / "data.npz"


def test_the_same_search_again_trains_nothing_and_says_the_same(searched: Searched, tmp_path: Path) -> None:
    place = searched.copy(tmp_path)
    metrics = (place / "search" / "run" / "metrics.jsonl").read_bytes()
    trained: list[str] = []
    # Not from the copied plan, whose data would be elsewhere.
    plan = searched.folder / "plan.toml"
    again = advise(plan, place / "search", choices=FEW, workers=1, on_trained=trained.append)
    assert (again.target, again.finalists) == (searched.found.target, searched.found.finalists)
    assert trained == []
    assert (place / "search" / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_search_that_was_cut_short_goes_on_to_the_same_advice(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def cut(*arguments: Any, **options: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return simulate(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(search, "simulate", cut)
        with pytest.raises(KeyboardInterrupt):
            search_in(tmp_path)
    found = search_in(tmp_path)
    assert (found.target, found.finalists) == (searched.found.target, searched.found.finalists)


def test_the_command_tells_what_to_type_next(
    searched: Searched, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(searched.copy(tmp_path))
    options = ("--points", 10, "--kind", "fedpara", "--gamma", 0.5, "--codec", "int8")
    found = run("advise", searched.folder / "plan.toml", "-o", "search", *options)
    assert found.code == 0
    assert found.err.startswith("learning rates: 4 settings, 1 round\n")
    first, *_, last = found.out.splitlines()[1:]
    assert "int8 both ways, lr 0.05" in first
    assert last.startswith(f"advised: {searched.found.best.setting}: reaches ")
    assert last.endswith("fedpara-edge simulate search/advised.toml -o RUN/")
    result = json.loads(run("advise", searched.folder / "plan.toml", "-o", "search", *options, "--json").out)
    assert result["target"] == searched.found.target
    assert result["finalists"][0]["bytes"] == searched.found.best.bytes
    assert result["plan"] == "search/advised.toml"


def test_with_no_points_to_give_up_dense_is_advised_where_nothing_reaches_it(
    searched: Searched, tmp_path: Path, run: Command
) -> None:
    place = searched.copy(tmp_path)
    (place / "search" / "advised.toml").unlink()
    metrics = place / "search" / "run" / "metrics.jsonl"
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    for event in events:  # as if no other setting had learned so much
        if event["event"] == "round" and event["arm"] != "dense_lr0.05":
            event["accuracy"] *= 0.9
    metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    options = ("--points", 0, "--kind", "fedpara", "--gamma", 0.5, "--codec", "int8")
    found = run("advise", searched.folder / "plan.toml", "-o", place / "search", *options)
    assert "advised: dense, lr 0.05: nothing cheaper reached" in found.out
    assert "allow more --points, or more rounds" in found.out
    assert not (place / "search" / "advised.toml").exists()


def test_bad_choices_are_refused_by_name(tmp_path: Path) -> None:
    for values, message in (
        ({"codec": ("int5",)}, "codec: expected one of"),
        ({"kind": ("dense",)}, "kind: expected some of"),
        ({"gamma": (1.5,)}, "gamma: expected"),
        ({"points": -1}, "points: expected"),
    ):
        with pytest.raises(InputError, match=message):
            Choices(**values)  # type: ignore[arg-type]
    tiny_plan.write_plan(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="expected a new folder or that of an earlier search, found another"):
        advise(tmp_path / "plan.toml", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]


def test_a_plan_that_changed_is_refused(searched: Searched, tmp_path: Path) -> None:
    searched.copy(tmp_path)
    plan = tmp_path / "plan.toml"
    (tmp_path / "data.npz").unlink()
    text = (searched.folder / "plan.toml").read_text().replace("batch_size = 8", "batch_size = 4")
    plan.write_text(text.replace('"data.npz"', f'"{searched.folder}/data.npz"'))
    with pytest.raises(InputError, match=r"train.batch_size: expected 8, found 4.*take another folder"):
        advise(plan, tmp_path / "search", choices=FEW, workers=1)


def test_a_dense_model_that_diverges_everywhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "RATES", (1e30,))
    tiny_plan.write_plan(tmp_path)
    with pytest.raises(FedparaError, match=r"dense model to train at one of the rates 1e\+29, found that it diverges"):
        advise(tmp_path / "plan.toml", tmp_path / "search", choices=FEW, workers=1)


@pytest.mark.parametrize(("rounds", "rungs"), [(1, (1,)), (2, (1, 2)), (9, (1, 3, 9)), (30, (3, 10, 30))])
def test_rungs_triple(tmp_path: Path, rounds: int, rungs: tuple[int, ...]) -> None:
    tiny_plan.write_plan(tmp_path, ("rounds = 2", f"rounds = {rounds}"))
    assert Search(plan=read_plan(tmp_path / "plan.toml"), tables={}, folder=tmp_path, seed=0).rungs == rungs


def test_bytes_decide_among_those_that_are_close_and_accuracy_among_the_others() -> None:
    def standing(accuracy: float | None, sent: int) -> Standing:
        return Standing(setting=Setting(family=DENSE, lr=1.0), accuracy=accuracy, loss=1.0, bytes=sent)

    standings = [standing(None, 1), standing(0.7, 1), standing(0.81, 9), standing(0.95, 10), standing(0.79, 2)]
    ranked = sorted(standings, key=lambda each: advice._cost(each, 0.8))
    assert [(each.accuracy, each.bytes) for each in ranked] == [(0.81, 9), (0.95, 10), (0.79, 2), (0.7, 1), (None, 1)]


def test_every_text_and_number_of_a_plan_survives_its_toml() -> None:
    tables = {
        "name": 'a "name" \\ of ü \x7f and \n lines',
        "rounds": 3,
        "train": {"lr": 1e-05, "nesterov": True, "empty": {}},
        "arms": {"a.b c": {"model": {"input_shape": [1, 4, 4], "exclude": ["*.0", "x"]}}, "d": {"rounds": 2}},
    }
    assert tomllib.loads(toml_text(tables)) == tables
