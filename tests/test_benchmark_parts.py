"""Benchmarks in parts: printed as they come, kept, gone on with after a stop, and written to the results file."""

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = """
import sys
from pathlib import Path

import click
from parts import keep_options, measure_parts

HERE = Path(__file__).parent


def measure(name):
    with (HERE / "measured.txt").open("a") as file:
        file.write(f"{{name}}\\n")
    if (HERE / name).exists():
        raise SystemExit(f"{{name}} fails")
    return {{"ms": len(name) / 3}}


@click.command()
@click.option("--size", default=9)
@keep_options
def main(size, kept, again):
    names = [f"{title} {{n}}" for n in range(3)]
    parts = {{name: lambda name=name: measure(name) for name in names}}
    measure_parts(parts, lambda found: "\\n".join(found), settings={{"size": size}}, kept=kept, again=again)


main()
"""


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return load


@pytest.fixture
def measure(imported: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Measure three parts that count how often they are, and return the results, the lines and what was measured."""
    parts = imported("parts")
    report: Callable[[Mapping[str, Any]], str] = lambda found: " ".join(f"{k}={v['ms']}" for k, v in found.items())  # noqa: E731

    def call(*, broken: str = "", settings: Mapping[str, Any] | None = None, again: bool = False, names: str = "abc"):
        measured: list[str] = []

        def part(name: str) -> dict[str, float]:
            measured.append(name)
            if name == broken:
                raise KeyboardInterrupt
            return {"ms": float(ord(name))}

        kept = tmp_path / "deep" / "kept.json"
        functions = {name: lambda name=name: part(name) for name in names}
        try:
            results = parts.measure_parts(functions, report, settings=settings or {}, kept=kept, again=again)
        except KeyboardInterrupt:
            results = None
        text = json.loads(kept.read_text())["text"]
        return results, capsys.readouterr().out.splitlines(), measured, text

    return call


def test_each_part_is_printed_and_kept_when_it_is_done(measure) -> None:
    results, lines, measured, text = measure()
    assert results == {name: {"ms": float(ord(name))} for name in "abc"}
    assert lines == ["a (0 s): ms 97", "b (0 s): ms 98", "c (0 s): ms 99"]
    assert (measured, text) == (list("abc"), "a=97.0 b=98.0 c=99.0")


def test_stopped_in_between_it_goes_on_with_what_is_missing(measure) -> None:
    _, lines, measured, text = measure(broken="b")
    assert (lines, measured) == (["a (0 s): ms 97"], ["a", "b"])
    assert text == "a=97.0\n\nunfinished: 2 of 3 parts are not measured yet"
    results, lines, measured, text = measure()
    assert lines[0].startswith("a: kept from 20")
    assert (measured, list(results), text) == (["b", "c"], list("abc"), "a=97.0 b=98.0 c=99.0")
    assert measure()[2] == []
    assert measure(again=True)[2] == list("abc")


def test_other_settings_are_measured_again(measure) -> None:
    assert measure(settings={"size": 1})[2] == list("abc")
    assert measure(settings={"size": 1})[2] == []
    _, lines, measured, _ = measure(settings={"size": 2})
    assert (measured, "other settings" in lines[0]) == (list("abc"), True)


def test_another_machine_is_measured_again(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    measure()
    monkeypatch.setattr("parts.machine", lambda: "another")
    assert measure()[2] == list("abc")


def test_parts_that_are_not_asked_for_stay_kept(measure) -> None:
    measure()
    assert measure(names="b")[3] == "a=97.0 b=98.0 c=99.0"  # nothing was measured, so nothing was written
    assert measure(names="d")[3] == "d=100.0"
    assert measure(names="abcd")[2] == []


@pytest.fixture
def bench(imported: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`benchmarks/run.py` with two benchmarks of three parts each, in a folder of their own."""
    run = imported("run")
    for script, title in (("one.py", "One"), ("two.py", "Two")):
        (tmp_path / script).write_text(SCRIPT.format(title=title))
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "SCRIPTS", {"First": "one.py", "Second": "two.py"})
    monkeypatch.setattr(run, "QUICK", {"one.py": ("--size", "1"), "two.py": ()})
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=":")
    monkeypatch.setattr(run.main.params[0], "type", click.STRING)

    def call(*arguments: str) -> Result:
        (tmp_path / "measured.txt").unlink(missing_ok=True)
        return CliRunner().invoke(run.main, arguments)

    return call


def measured_in(folder: Path) -> list[str]:
    file = folder / "measured.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_run_writes_sections_and_goes_on(bench, imported: Callable[[str], ModuleType], tmp_path: Path) -> None:
    (tmp_path / "One 1").touch()
    first = bench()
    assert (first.exit_code, "Error: one.py: ended with an error" in first.output) == (1, True)
    assert measured_in(tmp_path) == ["One 0", "One 1", "Two 0", "Two 1", "Two 2"]
    text = (tmp_path / "results.md").read_text()
    machine = imported("parts").machine()
    assert f"## First\n\n`python benchmarks/one.py`\n\n```text\n{machine}\n\nOne 0\n\nunfinished: 2 of 3 parts" in text
    assert f"## Second\n\n`python benchmarks/two.py`\n\n```text\n{machine}\n\nTwo 0\nTwo 1\nTwo 2\n```\n" in text
    (tmp_path / "One 1").unlink()
    second = bench()
    assert second.exit_code == 0, second.output
    assert measured_in(tmp_path) == ["One 1", "One 2"]
    assert [line for line in second.output.splitlines() if line.startswith("One")] == [
        next(line for line in second.output.splitlines() if line.startswith("One 0: kept from ")),
        "One 1 (0 s): ms 1.67",
        "One 2 (0 s): ms 1.67",
    ]
    assert "unfinished" not in (tmp_path / "results.md").read_text()


def test_run_measures_one_benchmark_again(bench, tmp_path: Path) -> None:
    assert bench().exit_code == 0
    before = (tmp_path / "results.md").read_text()
    assert bench("two.py", "--again").exit_code == 0
    assert measured_in(tmp_path) == ["Two 0", "Two 1", "Two 2"]
    assert (tmp_path / "results.md").read_text() == before


def test_run_quick_leaves_the_results_alone(bench, tmp_path: Path) -> None:
    assert bench("--quick").exit_code == 0
    assert not (tmp_path / "results.md").exists()
    assert "`python benchmarks/one.py --size 1`" in (tmp_path / ".kept" / "quick.md").read_text()
    assert bench().exit_code == 0
    assert len(measured_in(tmp_path)) == 6


def test_sections_are_found_again(imported: Callable[[str], ModuleType]) -> None:
    run = imported("run")
    text = (BENCHMARKS / "results.md").read_text(encoding="utf-8")
    sections = run.sections_of(text)
    assert list(sections) == list(run.SCRIPTS)
    assert text.endswith("\n".join(sections.values()))


def test_every_benchmark_has_a_quick_form(imported: Callable[[str], ModuleType]) -> None:
    run = imported("run")
    assert run.QUICK.keys() == set(run.SCRIPTS.values())
    assert all((BENCHMARKS / script).is_file() for script in run.QUICK)


def test_the_benchmark_of_the_page_says_what_is_missing(
    imported: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHROMIUM", "nowhere/chromium")
    done = CliRunner().invoke(imported("phone").main, [])
    remedy = "run: sudo apt install chromium, or set CHROMIUM to its path"
    assert (done.exit_code, done.output) == (0, f"phone.py: expected Chromium, found none; {remedy}\n")


def test_an_earlier_exporter_needs_the_history(
    imported: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = imported("earlier")
    monkeypatch.setattr(earlier, "ROOT", tmp_path)
    with pytest.raises(click.ClickException) as refused:
        earlier.code_of(earlier.BEFORE, tmp_path)
    assert refused.value.message == (
        f"{tmp_path}: expected a git checkout with commit b976b50 in its history, found none; clone the repository "
        "with its whole history"
    )
