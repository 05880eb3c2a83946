"""The figures of a report: what is drawn, and how curves are told apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import RISING, lines_of, summary_of, write_metrics, write_plan

from fedpara_edge.report.palette import look
from fedpara_edge.report.summarizing import select


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
