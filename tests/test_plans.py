"""The ready plans, and the results that are committed with them."""

import json
import runpy
from pathlib import Path

import pytest

from fedpara_edge.report import REPORT
from fedpara_edge.report.results import read_results
from fedpara_edge.report.summarizing import summarize
from fedpara_edge.report.units import percent
from fedpara_edge.simulation.plan.plan import first_difference, read_plan, read_tables

PLANS = Path(__file__).parents[1] / "plans"
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
    page = (run / REPORT).read_text(encoding="utf-8")
    best = max(sum(arm.final) / len(arm.final) for arm in summary.arms if arm.final)
    assert percent(best) in page
    assert all(f">{arm.name}<" in page for arm in summary.arms)


def test_no_result_is_left_without_its_plan() -> None:
    results = {path.name for path in (PLANS / "results").iterdir()}
    assert results == {path.stem for path in READY}


def test_committed_metrics_are_lines_of_json() -> None:
    for path in sorted((PLANS / "results").glob("*/metrics.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert {"event", "arm", "seed"} <= json.loads(line).keys()


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    tables = runpy.run_path(str(PLANS.parent / "docs" / "tables.py"))
    page = (PLANS.parent / "docs" / "reproducing.md").read_text(encoding="utf-8")
    assert tables["filled"](page) == page, "type: python docs/tables.py"
    assert page.count("<!-- table: ") == page.count("<!-- end -->") > 10
    assert "@@" not in page
