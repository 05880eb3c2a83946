"""The ready plans, and the results that are committed with them."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from command_line import Command

from fedpara_edge.report.comparison import accuracy
from fedpara_edge.report.figures import CAPTIONS, why_left_out
from fedpara_edge.report.results import read_results
from fedpara_edge.report.summarizing import summarize
from fedpara_edge.simulation.plan.plan import first_difference, read_plan, read_tables

ROOT = Path(__file__).parents[1]
PLANS = ROOT / "plans"
READY = sorted(PLANS.glob("*.toml"))
PAPER = sorted((PLANS / "paper").glob("*.toml"))


@pytest.mark.parametrize("path", [*READY, *PAPER], ids=lambda path: path.stem)
def test_a_plan_is_good_and_its_name_its_own(path: Path) -> None:
    plan = read_plan(path)
    assert plan.name.startswith(path.stem.partition("-")[0])
    names = [read_tables(other)["name"] for other in (*READY, *PAPER)]
    assert names.count(plan.name) == 1


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_plans_of_the_papers_size_say_so(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# NEEDS A LARGER MACHINE")


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_committed_result_is_of_the_plan_and_whole(path: Path) -> None:
    run = PLANS / "results" / path.stem
    assert first_difference(read_tables(run / "plan.toml"), read_tables(path)) is None
    plan, summary = read_plan(path), summarize(read_results(run))
    assert [arm.name for arm in summary.arms] == [arm.name for arm in plan.arms]
    for arm in summary.arms:
        assert arm.last_round == plan.arm(arm.name).rounds
        assert len(arm.final) + len(arm.unfinished) == len(plan.seeds), arm.name


@pytest.mark.slow
def test_the_report_of_a_committed_result(run: Command, tmp_path: Path) -> None:
    result = PLANS / "results" / "har-personal"
    ended = run("report", result, "-o", tmp_path / "page", "--json")
    assert (ended.code, ended.json["notes"]) == (0, [])
    page = Path(ended.json["report"]).read_text(encoding="utf-8")
    for arm in summarize(read_results(result)).arms:
        assert f">{arm.name}<" in page
        assert f">{accuracy(arm.final)}<" in page
    assert page.count("<svg") == (0 if why_left_out() else len(CAPTIONS))


def test_a_copy_of_a_plan_says_where_its_paths_count_from(run: Command, tmp_path: Path) -> None:
    shutil.copy(PLANS / "results" / "fashion-mnist-cnn" / "plan.toml", tmp_path)
    ended = run("simulate", tmp_path / "plan.toml", "-o", tmp_path / "again")
    assert ended.code == 2
    assert f"found nothing at {tmp_path}/.." in ended.err
    assert "a plan's relative paths count from its own folder, so a copy in a run folder needs others" in ended.err


def test_results_are_a_plan_and_its_metrics() -> None:
    found = {path.relative_to(PLANS / "results").as_posix() for path in (PLANS / "results").rglob("*.*")}
    assert found == {f"{path.stem}/{name}" for path in READY for name in ("plan.toml", "metrics.jsonl")}


def test_committed_metrics_are_lines_of_json() -> None:
    for path in sorted((PLANS / "results").glob("*/metrics.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert {"event", "arm", "seed"} <= json.loads(line).keys()


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    assert tables["filled"](page) == page, "type: python docs/tables.py"
    assert page.count("<!-- table: ") == page.count("<!-- end -->") > 10
    assert "@@" not in page


def test_the_figures_of_the_docs_are_what_the_command_draws(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the figures need the extra report")
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    committed = {path.stem: path for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert committed.keys() == figures["FIGURES"].keys()
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "plans").symlink_to(PLANS)
    monkeypatch.chdir(tmp_path)
    is_pinned = f"matplotlib=={matplotlib.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()
    for name, path in committed.items():
        assert run(*figures["command"](name)).code == 0
        drawn, kept = (tmp_path / "docs" / "figures" / path.name).read_bytes(), path.read_bytes()
        assert len(kept) < 60_000, name
        # Another matplotlib may draw and write the same figure in other words.
        assert drawn == kept if is_pinned else drawn.startswith(kept[:100]), f"{name}: type: make figures"
