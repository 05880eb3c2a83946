"""The report of a run: a page that needs nothing else, and the command that writes it."""

import re
import tomllib
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import Command
from small_run import RISING, lines_of, write_metrics, write_plan, write_run

from fedpara_edge.report import Report, write_report
from fedpara_edge.report.figures import CAPTIONS


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a finished run, in its folder."""
    return write_report(write_run(tmp_path_factory.mktemp("reported") / "run"))


LINE = "pip install 'matplotlib>=3.8'"


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_old_spelling_is_answered_with_the_new_one(run: Command, run_folder: Path) -> None:
    ended = run("simulate", run_folder / "plan.toml", "--report-only")
    assert (ended.code, ended.err) == (
        2,
        "Error: --report-only is now the command report; type: fedpara-edge report RUN\n",
    )
    assert "--report-only" not in run("simulate", "--help").out
