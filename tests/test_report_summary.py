"""What a report works out from the metrics of a run: rounds and bytes to an accuracy, means, and what is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import RISING, lines_of, summary_of, write_metrics, write_plan, write_run

from fedpara_edge.errors import InputError
from fedpara_edge.report import write_report
from fedpara_edge.report.comparison import (
    accuracy_table,
    arms_table,
    bytes_tables,
    clients_table,
    ranks_table,
    time_table,
)
from fedpara_edge.report.results import read_results
from fedpara_edge.report.summarizing import select


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


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


def test_arms_are_chosen_and_renamed(run_folder: Path) -> None:
    summary = summary_of(run_folder)
    chosen = select(summary, {"small": "FedPara", "dense": "original"})
    assert ([arm.name for arm in chosen.arms], chosen.reference) == (["FedPara", "original"], "original")
    assert chosen.targets == summary.targets
    assert select(summary, {"small": "small"}).reference == "small"
    for arms, text in (({"tiny": "a"}, "dense, small, found 'tiny'"), ({"small": "a", "dense": "a"}, "found a, a")):
        with pytest.raises(InputError, match=text):
            select(summary, arms)
