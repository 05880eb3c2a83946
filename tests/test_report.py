"""The report of a run: what is read, what is worked out from it, and a page that needs nothing else."""

import csv
import io
import json
import re
import tomllib
from collections import Counter
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command

from fedpara_edge.errors import InputError
from fedpara_edge.report import Report, figures, read_metrics, write_report
from fedpara_edge.report.comparison import (
    accuracy_table,
    arms_table,
    bytes_tables,
    clients_table,
    ranks_table,
    time_table,
)
from fedpara_edge.report.figures import CAPTIONS
from fedpara_edge.report.palette import look
from fedpara_edge.report.results import read_results
from fedpara_edge.report.summarizing import select, summarize
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
    """As a run leaves them, with every measure."""
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


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of such a run, in its folder."""
    return write_report(write_run(tmp_path_factory.mktemp("reported") / "run"))


LINE = "pip install 'matplotlib>=3.8'"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib was not installed, which also makes a report in no time."""
    monkeypatch.setattr(figures, "find_spec", lambda name: None if name == "matplotlib" else object())


def test_rounds_and_bytes_to_a_target_are_interpolated_on_the_smooth_mean(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense", "small", "bad"], target=0.6)
    arms = (
        lines_of("dense", RISING),
        lines_of("small", RISING, up=3, down=7),
        lines_of("bad", [0.2, 0.3, 0.4, 0.5, 0.59]),
    )
    write_metrics(tmp_path, [line for arm in arms for line in arm])
    summary = summary_of(tmp_path)
    assert (summary.reference, summary.targets, summary.is_planned) == ("dense", (0.6,), True)
    dense, small = (summary.reached(summary.arm(name), 0.6) for name in ("dense", "small"))
    assert dense is not None
    assert small is not None
    assert (dense.round, dense.bytes, dense.ratio) == pytest.approx((2.5, 250.0, 1.0))
    assert (small.round, small.bytes, small.ratio) == pytest.approx((2.5, 25.0, 10.0))
    assert summary.reached(summary.arm("bad"), 0.6) is None
    (table,) = bytes_tables(summary)
    assert table.rows == [
        ["dense", "2.5", "250 B", "1.00×"],
        ["small", "2.5", "25 B", "10.0×"],
        ["bad", "not reached, 1.0 points short", "–", "–"],
    ]


@pytest.mark.parametrize(
    ("accuracies", "target", "expected"),
    [
        ([0.7, 0.8], 0.6, 1.0),  # never before the first evaluated round
        ([0.7, 0.8], 0.8, 2.0),
        ([0.1, 0.1, 0.7, 0.1, 0.1], 0.4, None),  # one good round is no success
        ([0.5], 0.5, 1.0),
        ([None, 0.2, None, 0.6], 0.3, 2.5),
        ([None, None], 0.3, None),
    ],
)
def test_when_a_target_is_reached(
    tmp_path: Path, accuracies: list[float | None], target: float, expected: float | None
) -> None:
    write_plan(tmp_path, ["dense"], target=target)
    write_metrics(tmp_path, lines_of("dense", accuracies))
    summary = summary_of(tmp_path)
    found = summary.reached(summary.arms[0], target)
    assert (None if found is None else found.round) == (None if expected is None else pytest.approx(expected))
    if found is not None:
        assert found.bytes == pytest.approx(100 * found.round)


def test_without_a_planned_target_the_reference_sets_it(tmp_path: Path) -> None:
    write_plan(tmp_path, ["small", "other"])
    write_metrics(tmp_path, [*lines_of("small", RISING), *lines_of("other", [0.9, 0.9, 0.9, 0.9, 0.9])])
    summary = summary_of(tmp_path)
    assert summary.reference == "small"
    assert summary.targets == pytest.approx((0.79, 0.795))
    assert not summary.is_planned
    write_plan(tmp_path, ["small", "other"], reference="other")
    assert summary_of(tmp_path).targets == pytest.approx((0.89, 0.895))
    write_plan(tmp_path, ["small", "dense"])
    write_metrics(tmp_path, [*lines_of("small", RISING), *lines_of("dense", RISING)])
    assert summary_of(tmp_path).reference == "dense"


def test_curves_are_means_over_the_rounds_that_all_seeds_have(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"], seeds=[0, 1, 2])
    seeds = lines_of("dense", [0.1, 0.3, 0.5]), lines_of("dense", [0.3, 0.5], seed=1, up=50)[:-1]
    write_metrics(tmp_path, [line for seed in seeds for line in seed])
    (arm,) = summary_of(tmp_path).arms
    assert arm.accuracy is not None
    assert arm.accuracy.seeds == 2
    np.testing.assert_allclose(arm.accuracy.rounds, [1, 2])
    np.testing.assert_allclose(arm.accuracy.mean, [0.2, 0.4])
    np.testing.assert_allclose(arm.accuracy.sd, [0.02**0.5, 0.02**0.5])
    assert (arm.final, arm.is_complete) == ((0.5,), False)
    assert arm.rounds == (3, 2)
    assert arm.unfinished == {0: "3 of 5 rounds done", 1: "2 of 5 rounds done"}
    assert arm.round_bytes == pytest.approx((100 + 120) / 2)
    assert arm.bytes_until(1.5) == pytest.approx(1.5 * 110)
    assert arm.bytes_until(3) is None


def test_seconds_are_computing_and_bytes_of_one_participant_over_the_rate(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense", "small"])
    arms = lines_of("dense", RISING, up=3_000_000, down=2_000_000), lines_of("small", RISING, up=300_000, down=200_000)
    write_metrics(tmp_path, [line for arm in arms for line in arm])
    summary = summary_of(tmp_path)
    dense, small = summary.arms
    assert dense.sending_seconds(2) == pytest.approx(8 * 2.5e6 / 2e6)
    assert dense.round_seconds(50) == pytest.approx(1.5 + 0.4)
    table = time_table(summary)
    assert table is not None
    assert table.rows[0] == ["dense", "1.50 s", "10.0 s", "11.5 s", "2.00 s", "3.50 s", "0.400 s", "1.90 s"]
    assert table.rows[1][2:4] == ["1.00 s", "2.50 s (4.6×)"]
    assert small.round_seconds(2) == pytest.approx(2.5)


def test_the_table_of_arms_has_means_and_differences(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense", "small"], seeds=[0, 1])
    accuracies = {("dense", 0): 0.82, ("dense", 1): 0.84, ("small", 0): 0.80, ("small", 1): 0.83}
    write_metrics(
        tmp_path, [e for (arm, seed), last in accuracies.items() for e in lines_of(arm, [0.1, last], seed=seed)]
    )
    table = arms_table(summary_of(tmp_path))
    assert [row[0] for row in table.rows] == ["dense", "small"]
    assert table.rows[0][1:] == ["mlp, dense", "40", "10.0 %", "100 B", "2 × 2", "83.0 ± 1.4 %", "–"]
    assert table.rows[1][1:] == ["mlp, fedpara γ\u00a00.1", "40", "10.0 %", "100 B", "2 × 2", "81.5 ± 2.1 %", "−1.5"]


def test_clients_that_train_alone_send_nothing(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense", "alone"], target=0.6)
    arms = lines_of("dense", RISING), lines_of("alone", RISING, up=0, down=0, local_only=True)
    write_metrics(tmp_path, [line for arm in arms for line in arm])
    summary = summary_of(tmp_path)
    reached = summary.reached(summary.arm("alone"), 0.6)
    assert reached is not None
    assert (reached.bytes, reached.ratio) == (0.0, None)
    assert bytes_tables(summary)[0].rows[1] == ["alone", "2.5", "nothing", "–"]
    write_report(tmp_path)
    assert (tmp_path / "accuracy-by-bytes.png").exists()


def test_a_torn_last_line_is_left_out_and_damage_before_it_is_named(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"])
    write_metrics(tmp_path, lines_of("dense", RISING)[:-1], torn='{"event": "round", "arm": "dense", "se')
    assert summary_of(tmp_path).arms[0].rounds == (5,)
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([text[0], text[1][:-7], *text[2:]]), encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2: expected a JSON object, found damaged text"):
        read_results(tmp_path)


@pytest.mark.usefixtures("no_figures")
def test_missing_null_and_foreign_fields_are_not_measured(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"])
    who = {"event": "round", "arm": "dense", "seed": 0}
    lines: list[dict[str, Any]] = [
        {**who, "round": 1, "accuracy": 0.1, "up_bytes": 5, "down_bytes": 5, "participants": 0},
        {**who, "round": 1, "accuracy": 0.2, "up_bytes": 5, "down_bytes": 5, "participants": 0},
        {**who, "round": 2, "accuracy": float("nan"), "up_bytes": None, "gap": True, "ranks": {"a": None}},
        {**who, "round": 3, "accuracy": 0.4, "up_bytes": 1, "down_bytes": 1},
        {**who, "round": "four", "accuracy": 0.9},
        {"event": "clients", "arm": "dense", "seed": 0, "round": 3, "clients": {"a": {"accuracy": None}, "b": 3}},
        {"event": "clients", "arm": "dense", "seed": 0, "round": 4, "clients": {"a": {"accuracy": 1.0}}},
        {"event": "news", "arm": "dense", "seed": 0},
        {"event": "round"},
    ]
    write_metrics(tmp_path, lines, torn="[1, 2]\n\n")
    (arm,) = summary_of(tmp_path).arms
    assert arm.accuracy is not None
    np.testing.assert_array_equal(arm.accuracy.rounds, [1, 3])
    np.testing.assert_array_equal(arm.accuracy.mean, [0.2, 0.4])
    assert arm.total_bytes is not None
    np.testing.assert_array_equal(arm.total_bytes.mean, [10])
    assert (arm.gap, arm.train_seconds, arm.participant_bytes, len(arm.clients), arm.ranks) == (None, None, None, 0, {})
    assert write_report(tmp_path).page.exists()


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_has_measured_nothing_is_refused(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"])
    with pytest.raises(InputError, match=r"metrics\.jsonl: expected the metrics of a run, found No such file"):
        write_report(tmp_path)
    write_metrics(tmp_path, [{"event": "news"}])
    with pytest.raises(InputError, match="expected lines about arms, found none"):
        write_report(tmp_path)
    (tmp_path / "plan.toml").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl, found none"):
        write_report(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("no_figures")
def test_a_diverged_seed_is_noted(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"])
    lines = lines_of("dense", [0.1, 0.1])
    write_metrics(tmp_path, [*lines[:-1], lines[-1] | {"diverged": "the loss is NaN"}])
    assert summary_of(tmp_path).arms[0].unfinished == {0: "diverged after round 2: the loss is NaN"}
    page = write_report(tmp_path).page.read_text(encoding="utf-8")
    assert "dense, seed 0: diverged after round 2: the loss is NaN" in page


@pytest.mark.usefixtures("no_figures")
def test_an_arm_that_diverged_at_once_is_kept_and_noted(tmp_path: Path) -> None:
    write_plan(tmp_path, ["wild", "small"], reference="wild")
    first, done = lines_of("wild", [])
    wild = [first, done | {"diverged": "the loss is NaN"}]
    write_metrics(tmp_path, [*wild, *lines_of("small", RISING)])
    summary = summary_of(tmp_path)
    assert (summary.reference, summary.targets) == ("wild", ())
    none, small = arms_table(summary).rows
    assert none[0] == "wild"
    assert none[4:] == ["–", "0 × 1", "–", "–"]
    assert small[-2:] == ["80.0 %", "–"]
    page = write_report(tmp_path).page.read_text(encoding="utf-8")
    assert "wild, seed 0: diverged in round 1: the loss is NaN" in page
    assert "wild, the reference, has no accuracy" in page
    write_metrics(tmp_path, wild)
    assert "diverged in round 1" in write_report(tmp_path).page.read_text(encoding="utf-8")
    write_metrics(tmp_path, lines_of("small", RISING))
    assert "wild, the plan&#x27;s reference, has not begun" in write_report(tmp_path).page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_figures")
def test_a_reference_that_sends_nothing_has_no_ratios(tmp_path: Path) -> None:
    write_plan(tmp_path, ["alone", "small"], target=0.6)
    write_metrics(tmp_path, [*lines_of("alone", RISING, up=0, down=0, local_only=True), *lines_of("small", RISING)])
    assert summary_of(tmp_path).reference == "small"
    write_plan(tmp_path, ["alone", "small"], target=0.6, reference="alone")
    summary = summary_of(tmp_path)
    assert summary.reference == "alone"
    assert [row[-1] for row in bytes_tables(summary)[0].rows] == ["1.00×", "–"]
    assert write_report(tmp_path).page.exists()


@pytest.mark.usefixtures("no_figures")
def test_accuracy_is_that_of_the_seeds_that_came_to_the_last_round(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense", "small", "lost"], seeds=[0, 1], target=0.6)
    *early, end = lines_of("small", [0.9, 0.9], seed=1)
    first, *_, done = lines_of("lost", [], seed=1)
    lost = lines_of("lost", [*RISING[:4], None])
    lost[-2] |= {"loss": None}
    arms = (
        [*lines_of("dense", RISING), *lines_of("dense", RISING, seed=1)],
        [*lines_of("small", RISING), *early, end | {"diverged": "the loss is NaN"}],
        [*lost, first, done | {"diverged": "the loss is NaN"}],
    )
    write_metrics(tmp_path, [line for arm in arms for line in arm])
    summary = summary_of(tmp_path)
    assert {arm.last_round for arm in summary.arms} == {5}
    assert [row[-2:] for row in arms_table(summary).rows] == [
        ["80.0 ± 0.0 %", "–"],
        ["80.0 % (1 of 2 seeds)", "–"],
        ["– (0 of 2 seeds)", "–"],
    ]
    assert summary.arm("lost").unfinished[0] == "the loss after round 5 is not finite"
    assert [row[1] for row in bytes_tables(summary)[0].rows] == ["2.5", "1.3", "2.5 (1 of 2 seeds)"]
    assert write_report(tmp_path).page.exists()


@pytest.mark.usefixtures("no_figures")
def test_an_arm_of_fewer_rounds_is_evaluated_after_its_own_last(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense", "long"], target=0.6)
    plan = tmp_path / "plan.toml"
    plan.write_text(plan.read_text().replace('[arms."dense"]', '[arms."dense"]\nrounds = 3'))
    write_metrics(tmp_path, [*lines_of("dense", RISING[:3]), *lines_of("long", [*RISING[:4], 0.9])])
    summary = summary_of(tmp_path)
    assert [(arm.last_round, arm.final) for arm in summary.arms] == [(3, (0.8,)), (5, (0.9,))]
    table = arms_table(summary)
    assert "after the last round of the arm" in table.caption
    assert table.rows[1][-1] == "+10.0"
    by_round = accuracy_table(summary)
    assert by_round is not None
    assert by_round.header == ["after round", "1", "2", "3", "4", "5", "best, smoothed"]
    page = write_report(tmp_path).page.read_text()
    assert "3 to 5 rounds" in page


def test_an_arm_of_more_rounds_that_was_stopped_is_compared_where_it_was_last_evaluated(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense", "long"], rounds=7, evaluate_every=2)
    plan = tmp_path / "plan.toml"
    plan.write_text(plan.read_text().replace('[arms."long"]', '[arms."long"]\nrounds = 11'))
    seven = [None, 0.5, None, 0.6, None, 0.7]
    stopped = [line for line in lines_of("long", [*seven, None]) if line["event"] != "done"]
    stopped[-1] |= {"loss": None}  # as where a round is not evaluated
    write_metrics(tmp_path, [*lines_of("dense", [*seven, 0.8]), *stopped])
    long = summary_of(tmp_path).arm("long")
    assert (long.last_round, long.final, long.unfinished) == (6, (0.7,), {0: "7 of 11 rounds done"})


def test_lines_of_different_lengths_have_a_legend(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures need the extra report")
    from fedpara_edge.report.plots.lines import accuracy_by_round

    for rounds, legends in ((5, 0), (3, 1)):
        write_plan(tmp_path, ["dense", "long"])
        plan = tmp_path / "plan.toml"
        plan.write_text(plan.read_text().replace('[arms."dense"]', f'[arms."dense"]\nrounds = {rounds}'))
        lines = [*lines_of("dense", [*RISING[:4], 0.9][:rounds]), *lines_of("long", [*RISING[:4], 0.9])]
        write_metrics(tmp_path, lines)
        figure = accuracy_by_round(summary_of(tmp_path))
        assert figure is not None
        assert len(figure.legends) == legends


class Page(HTMLParser):
    """Tags, identifiers and references of a page; refuses one whose elements are not closed in order."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.identifiers: list[str] = []
        self.references: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert value is not None
            if name == "id":
                self.identifiers.append(value)
            if name in ("href", "src", "srcset", "data", "action", "xlink:href"):
                self.references.append(value)
            self.references += re.findall(r"url\((.*?)\)", value)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_needs_nothing_else(report: Report) -> None:
    assert (report.page.name, report.notes) == ("report.html", ())
    text = report.page.read_text(encoding="utf-8")
    assert "http" not in text
    assert "@import" not in text
    page = Page(text)
    assert not page.tags.keys() & {"script", "link", "iframe", "img", "object", "embed"}
    assert page.tags["svg"] == page.tags["figure"] == len(CAPTIONS)
    assert page.references
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.identifiers)
    assert all(reference.startswith("#") for reference in page.references)
    assert not [name for name, count in Counter(page.identifiers).items() if count > 1]
    variables = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert variables
    for scheme in re.findall(r":root \{(.*?)\}", text):
        assert variables <= set(re.findall(r"(--[\w-]+):", scheme))
    colours = {
        colour
        for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        for colour in re.findall(r"#[0-9a-f]{6}\b", figure)
    }
    assert not colours
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text


def test_there_is_a_png_for_each_figure(report: Report) -> None:
    pngs = {path.stem: path for path in report.page.parent.glob("*.png")}
    assert pngs.keys() == CAPTIONS.keys()
    assert set(report.figures) == set(pngs.values())
    assert report.left_out is None
    for path in pngs.values():
        header = path.read_bytes()[:24]
        assert header.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(header[16:20], "big") > 1000
        assert int.from_bytes(header[20:24], "big") > 200


def test_a_report_made_again_elsewhere_is_the_same(report: Report, tmp_path: Path) -> None:
    again = write_report(report.page.parent, tmp_path / "again")
    assert again.page.parent == tmp_path / "again"
    for one, other in zip((report.page, *report.figures), (again.page, *again.figures), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_without_matplotlib_there_are_the_tables_and_the_line_to_type(run: Command, run_folder: Path) -> None:
    (run_folder / "gap.png").write_bytes(b"of an earlier report")
    (run_folder / "report.html").touch()
    ended = run("report", run_folder)
    assert (ended.code, ended.out) == (0, f"report: {run_folder}/report.html\n")
    assert ended.err.startswith("figures were left out: they need matplotlib")
    assert ended.err.endswith(f"type: {LINE}\n")
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    assert escape(LINE) in text
    page = Page(text)
    assert (page.tags["svg"], page.tags["table"]) == (0, 9)
    assert not list(run_folder.glob("*.png"))
    refused = run("report", run_folder, "--figure", "gap", "-o", run_folder / "gap.svg")
    assert (refused.code, LINE in refused.err) == (2, True)


def test_the_line_to_type_asks_for_what_the_extra_does() -> None:
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["report"] == [LINE.split("'")[1]]


@pytest.mark.usefixtures("no_figures")
def test_one_arm_and_one_seed_are_enough(tmp_path: Path) -> None:
    write_plan(tmp_path, ["small"], seeds=[7])
    write_metrics(tmp_path, [line | {"seed": 7} for line in lines_of("small", [0.5])])
    text = write_report(tmp_path).page.read_text(encoding="utf-8")
    assert "50.0 %" in text
    assert "± 0" not in text
    assert Page(text).tags["h2"] == 4  # arms, accuracy, bytes, time: nothing else was measured


@pytest.mark.usefixtures("no_figures")
def test_a_run_without_accuracy_has_no_targets(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"])
    write_metrics(tmp_path, lines_of("dense", [None, None]))
    summary = summary_of(tmp_path)
    assert summary.targets == ()
    assert arms_table(summary).rows[0][-2:] == ["–", "–"]
    assert "Bytes to an accuracy" not in write_report(tmp_path).page.read_text(encoding="utf-8")


def test_clients_and_ranks_are_those_of_the_last_round(run_folder: Path) -> None:
    summary = summary_of(run_folder)
    clients, ranks = clients_table(summary), ranks_table(summary)
    assert clients is not None
    assert clients.rows[1] == ["small", "10", "50.0 %", "70.0 %", "90.0 %", "70.0 %", "14.1 %"]
    assert ranks is not None
    assert ranks.header == ["layer", "full rank", "small"]
    assert ranks.rows == [["a<b>", "16", "16"], ["c", "8", "4"]]


def test_many_arms_with_long_names_have_looks_of_their_own(tmp_path: Path) -> None:
    plots = pytest.importorskip("fedpara_edge.report.plots.drawing", reason="needs matplotlib, of the extra report")
    names = [f"{'long-' * 8}{number}" for number in range(20)]
    write_plan(tmp_path, names)
    write_metrics(tmp_path, [line for name in names for line in lines_of(name, RISING)])
    summary = summary_of(tmp_path)
    looks = {tuple(sorted(look(summary, arm).items())) for arm in summary.arms}
    assert len(looks) == len(names)
    assert plots.draw(summary).keys() == {
        "accuracy-by-round",
        "accuracy-by-bytes",
        "bytes-to-target",
        "seconds-per-round",
    }


@pytest.mark.usefixtures("no_figures")
def test_missing_and_unfinished_arms_and_seeds_are_told(run: Command, tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense", "small", "later", "last"], seeds=[0, 1])
    lines = [*lines_of("dense", RISING), *lines_of("dense", RISING, seed=1), *lines_of("small", RISING[:3])[:-1]]
    write_metrics(tmp_path, lines)
    notes = [
        "arms of the plan that have not begun, 2 of 4: later, last",
        "small, seed 0: 3 of 5 rounds done",
        "small, seed 1: not begun",
    ]
    ended = run("report", tmp_path)
    assert ended.err.splitlines()[:-1] == notes
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f'<p class="note">{note}</p>' in page for note in notes)
    assert run("report", tmp_path, "--json").json["notes"] == notes


def test_a_run_that_was_given_more_rounds_is_not_done(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"], rounds=7)
    more = {"event": "round", "arm": "dense", "seed": 0, "round": 6, "accuracy": 0.8}
    write_metrics(tmp_path, [*lines_of("dense", RISING), more])
    assert summary_of(tmp_path).arms[0].unfinished == {0: "6 of 7 rounds done"}


@pytest.mark.parametrize(
    ("best", "short"), [(0.59, "1.0"), (0.599, "0.1"), (0.5996, "0.04"), (0.59999, "less than 0.01")]
)
def test_a_shortfall_never_reads_as_none(tmp_path: Path, best: float, short: str) -> None:
    write_plan(tmp_path, ["dense"], target=0.6)
    write_metrics(tmp_path, lines_of("dense", [0.2, best]))
    assert bytes_tables(summary_of(tmp_path))[0].rows[0][1] == f"not reached, {short} points short"


def test_the_table_of_accuracies_has_spreads_and_the_smoothed_best(run_folder: Path, tmp_path: Path) -> None:
    table = accuracy_table(summary_of(run_folder))
    assert table is not None
    assert table.rows[0] == ["dense", "30.5 ± 0.7", "40.5 ± 0.7", "50.5 ± 0.7", "60.5 ± 0.7", "60.5"]
    write_plan(tmp_path, ["dense"])
    write_metrics(tmp_path, lines_of("dense", [0.2, 0.9, 0.4, 0.5]))
    table = accuracy_table(summary_of(tmp_path))
    assert table is not None
    assert table.rows == [["dense", "20.0", "90.0", "40.0", "50.0", "60.0"]]
    assert "±" not in table.caption


def test_bands_end_at_0_and_100_percent(tmp_path: Path) -> None:
    lines = pytest.importorskip("fedpara_edge.report.plots.lines", reason="needs matplotlib, of the extra report")
    savings = pytest.importorskip("fedpara_edge.report.plots.savings")
    write_plan(tmp_path, ["dense"], seeds=[0, 1])
    write_metrics(tmp_path, [*lines_of("dense", [0.0, 1.0]), *lines_of("dense", [0.1, 0.9], seed=1)])
    for figure in (lines.accuracy_by_round(summary_of(tmp_path)), savings.accuracy_by_bytes(summary_of(tmp_path))):
        (band,) = figure.axes[0].collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (0.0, 1.0)


def text_of(figure: Any) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def test_a_single_target_shows_the_saving_where_lines_cross_it(tmp_path: Path) -> None:
    savings = pytest.importorskip("fedpara_edge.report.plots.savings", reason="needs matplotlib, of the extra report")
    write_plan(tmp_path, ["dense", "small", "alone"], target=0.6)
    arms = lines_of("dense", RISING, up=3000, down=7000), lines_of("small", RISING, up=3, down=7)
    write_metrics(tmp_path, [line for arm in arms for line in arm])
    summary = summary_of(tmp_path)
    figure = savings.accuracy_by_bytes(summary)
    assert {"1000× fewer bytes", "25 B", "25.0 kB", "target\n60.0 %"} <= text_of(figure)
    lines = {tuple(line.get_xdata()): line.get_ydata() for line in figure.axes[0].get_lines()}
    np.testing.assert_allclose(lines[(10, 20, 30, 40, 50)], [0.2, 0.5, 0.8, 0.8, 0.8])  # the points, drawn later
    rings = [x for (x, *more) in lines if not more]
    assert sorted(rings) == pytest.approx([25, 25_000])
    two = savings.accuracy_by_bytes(replace(summary, targets=(0.5, 0.6)))
    assert "targets\n60.0 %\n50.0 %" in text_of(two)
    assert not [text for text in text_of(two) if "fewer" in text]


def test_few_curves_have_their_names_beside_them_and_many_a_legend(tmp_path: Path) -> None:
    savings = pytest.importorskip("fedpara_edge.report.plots.savings", reason="needs matplotlib, of the extra report")
    names = [f"arm-{number}" for number in range(7)]
    write_plan(tmp_path, names)
    write_metrics(
        tmp_path,
        [line for place, name in enumerate(names) for line in lines_of(name, RISING, up=30 * 20**place, down=0)],
    )
    summary = summary_of(tmp_path)
    few = savings.accuracy_by_bytes(select(summary, {name: f"{name}, long" for name in names[:3]}))
    assert not few.legends
    assert {f"arm-{number}\nlong" for number in range(3)} <= text_of(few)
    many = savings.accuracy_by_bytes(summary)
    assert len(many.legends) == 1
    write_metrics(tmp_path, [line for name in names[:5] for line in lines_of(name, [0.5])])
    crowded = savings.accuracy_by_bytes(summary_of(tmp_path))
    assert len(crowded.legends) == 1
    assert not [text for text in text_of(crowded) if text.startswith("arm")]


def test_arms_are_chosen_and_renamed(run_folder: Path) -> None:
    summary = summary_of(run_folder)
    chosen = select(summary, {"small": "FedPara", "dense": "original"})
    assert ([arm.name for arm in chosen.arms], chosen.reference) == (["FedPara", "original"], "original")
    assert chosen.targets == summary.targets
    assert select(summary, {"small": "small"}).reference == "small"
    for arms, text in (({"tiny": "a"}, "dense, small, found 'tiny'"), ({"small": "a", "dense": "a"}, "found a, a")):
        with pytest.raises(InputError, match=text):
            select(summary, arms)


@pytest.mark.usefixtures("no_figures")
def test_a_report_goes_elsewhere_and_replaces_only_a_report(run: Command, run_folder: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in run_folder.iterdir())
    output = tmp_path / "pages"
    ended = run("report", run_folder, "-o", output, "--json")
    assert ended.code == 0
    assert ended.json["report"] == str(output / "report.html")
    assert sorted(path.name for path in run_folder.iterdir()) == before
    again = run("report", run_folder, "-o", output)
    assert "found an existing one" in again.err
    (output / "notes.txt").write_text("mine")
    assert run("report", run_folder, "-o", output, "--overwrite").code == 0
    assert (output / "notes.txt").read_text() == "mine"
    nowhere = run("report", tmp_path / "nowhere")
    assert (nowhere.code, "nowhere: expected a run folder with metrics.jsonl" in nowhere.err) == (2, True)


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_one_figure_is_a_file(run: Command, run_folder: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="the figures need the extra report")
    file = tmp_path / f"figure.{suffix}"
    command = ("report", run_folder, "--figure", "accuracy-by-bytes", "--arm", "small=FedPara", "--arm", "dense")
    ended = run(*command, "--target", 0.5, "--title", "A < B", "-o", file)
    assert (ended.code, ended.out) == (0, f"figure: {file}\n")
    first = file.read_bytes()
    assert first.startswith({"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF"}[suffix])
    assert "found an existing one" in run(*command, "-o", file).err
    run(*command, "--target", 0.5, "--title", "A < B", "-o", file, "--overwrite")
    assert file.read_bytes() == first
    if suffix == "svg":
        page = Page(first.decode())
        assert {reference.removeprefix("#") for reference in page.references} <= set(page.identifiers)
        assert "<title>A &lt; B</title>" in first.decode()
        assert "prefers-color-scheme: dark" in first.decode()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--figure", "losses", "-o", "a.svg"), "figure: expected one of this run's figures, accuracy-by-round, "),
        (("--figure", "gap"), "--output: expected a file for the figure, found none; add -o FILE.svg"),
        (("--figure", "gap", "-o", "a.jpg"), "ends in .png, .svg, .pdf"),
        (("--figure", "gap", "-o", "a.svg", "--arm", "tiny"), "arm: expected one of the run's arms"),
        (("--figure", "gap", "-o", "a.svg", "--target", 86), "target: expected an accuracy between 0 and 1, found 86"),
        (
            ("--figure", "gap", "-o", "a.svg", "--csv", "a.csv"),
            "--csv, --figure, --track: expected one, found several",
        ),
        (("--arm", "small"), "expected with --figure NAME"),
        (("--csv", "a.csv", "-o", "b"), "--output: expected without --csv"),
        (("--track", "wandb:a", "-o", "b"), "--output: expected without --track"),
        (("--follow",), "--follow: expected with --track KIND:PLACE, found without"),
        (("--csv", "-", "--json"), "expected a file beside --json"),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Command, run_folder: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], text: str
) -> None:
    pytest.importorskip("matplotlib", reason="the figures need the extra report")
    monkeypatch.chdir(run_folder)
    ended = run("report", ".", *options)
    assert (ended.code, text in ended.err) == (2, True), ended.err
    assert sorted(path.name for path in run_folder.iterdir()) == ["metrics.jsonl", "plan.toml"]


def test_metrics_are_rows_for_a_data_frame(run_folder: Path) -> None:
    rows = read_metrics(run_folder)
    assert [(row["arm"], row["seed"], row["round"]) for row in rows] == [
        (arm, seed, number) for arm in ("dense", "small") for seed in (0, 1) for number in range(1, 5)
    ]
    assert len({tuple(row) for row in rows}) == 1
    assert not [value for row in rows for value in row.values() if isinstance(value, dict | list)]
    last = rows[-1]
    assert last["accuracy"] == pytest.approx(0.61)
    assert (last["gap"], last["kind"], last["shared_parameters"]) == (0.04, "fedpara", 40)
    assert (last["ranks.c"], last["full_ranks.c"], rows[0]["ranks.c"]) == (4, 8, None)
    assert [row["total_bytes"] for row in rows[:4]] == [100, 200, 300, 400]
    assert not {"event", "ranks", "clients.client-0"} & last.keys()


def test_the_participants_of_a_round_go_before_the_arms_and_no_rejection_is_0(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"])
    first, one, two, done = lines_of("dense", [0.1, 0.2], participants=4)
    write_metrics(
        tmp_path, [first, one | {"participants": 3, "rejections": {}}, two | {"rejections": {"shape": 2}}, done]
    )
    rows = read_metrics(tmp_path)
    assert [(row["participants"], row["rejections.shape"]) for row in rows] == [(3, 0), (2, 2)]


def test_the_table_of_metrics_is_csv(run: Command, run_folder: Path, tmp_path: Path) -> None:
    rows = read_metrics(run_folder)
    file = tmp_path / "metrics.csv"
    ended = run("report", run_folder, "--csv", file, "--json")
    assert (ended.json["rows"], ended.json["columns"]) == (16, list(rows[0]))
    text = file.read_text(encoding="utf-8")
    expected = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert list(csv.DictReader(io.StringIO(text))) == expected
    assert run("report", run_folder, "--csv", "-").out == text
    assert "found an existing one" in run("report", run_folder, "--csv", file).err
    assert run("report", run_folder, "--csv", file, "--overwrite").code == 0
    assert not (run_folder / "report.html").exists()


def test_the_old_spelling_is_answered_with_the_new_one(run: Command, run_folder: Path) -> None:
    ended = run("simulate", run_folder / "plan.toml", "--report-only")
    assert (ended.code, ended.err) == (
        2,
        "Error: --report-only is now the command report; type: fedpara-edge report RUN\n",
    )
    assert "--report-only" not in run("simulate", "--help").out
