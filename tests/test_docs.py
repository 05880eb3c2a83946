"""What the documentation lists is what there is: codecs with their versions, specifications, public names."""

import re
import shlex
from pathlib import Path

import click
import pytest

import fedpara_edge
from fedpara_edge import cli, codecs, nn
from fedpara_edge.codecs import ENCODERS, OPENERS, find_encoder
from fedpara_edge.errors import EXIT_CODES
from fedpara_edge.simulation.plan.plan import read_plan

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
NEEDED = {"adaptive": "adaptive:error=0.5"}
"""Codecs that can't do without options, with some."""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def specified(page: str) -> set[str]:
    """Modules whose docstrings a page shows."""
    return set(re.findall(r"^```\{specification\} (\S+)$", read(page), re.MULTILINE))


def parse(words: list[str]) -> None:
    """Parse a command line by the options that there are, without its values."""
    command: click.Command | None = cli.fedpara_edge
    while isinstance(command, click.Group):
        context = click.Context(command)
        _, words, _ = command.make_parser(context).parse_args(words)
        if not words:  # `fedpara-edge --help`
            return
        name, *words = words
        command = command.get_command(context, name)
        assert command, f"{name} is no command"
    assert command
    command.make_parser(click.Context(command)).parse_args(words)


def test_the_changelog_has_the_versions_of_all_codecs() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d, ]+) \| (\d+) \|$", read("CHANGELOG.md"), re.MULTILINE)
    stated = {name: (set(map(int, reads.split(", "))), int(writes)) for name, reads, writes in rows}
    written = {encoder.name: encoder.version for encoder in map(find_encoder, (NEEDED.get(n, n) for n in ENCODERS))}
    read_here = {name: {version for other, version in OPENERS if other == name} for name, _ in OPENERS}
    assert stated == {name: (read_here[name], version) for name, version in written.items()}


def test_every_part_of_a_codec_is_specified() -> None:
    modules = {path.stem for path in (ROOT / "fedpara_edge" / "codecs").glob("*.py")}
    named = set(re.findall(r"`(\w+)`", codecs.__doc__ or "")) & modules
    assert {f"fedpara_edge.codecs.{name}" for name in named - {"rounding"}} <= specified("docs/reference/codecs.md")


def test_every_format_is_specified() -> None:
    homes = [*(ROOT / "fedpara_edge" / "formats").glob("*.py"), ROOT / "device_runtime" / "state.py"]
    texts = {path: path.read_text(encoding="utf-8").split('"""')[1] for path in homes}
    with_version = {path for path, text in texts.items() if re.search(r"\bversion\b", text)}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in with_version}
    assert len(names) >= 7
    assert names <= specified("docs/reference/files.md")


def test_every_exit_code_is_listed() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", read("docs/reference/exit-codes.md"), re.MULTILINE)
    stated = {int(code): meaning for code, meaning in rows}
    assert stated.keys() == EXIT_CODES.keys()
    assert [code for code, outcome in EXIT_CODES.items() if not stated[code].startswith(outcome)] == []


def test_every_public_name_is_documented_once() -> None:
    groups = re.findall(r"^```\{public\} (.+)$", read("docs/reference/api.md"), re.MULTILINE)
    assert sorted(name for group in groups for name in group.split()) == sorted(fedpara_edge.__all__)
    layers = re.findall(r"^\.\. \S+:: fedpara_edge\.nn\.(\w+)$", read("docs/reference/nn.md"), re.MULTILINE)
    assert sorted(layers) == sorted(nn.__all__)


def test_the_plan_that_a_page_shows_is_good(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", read("docs/howto/simulation.md"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "codecs.toml"
    path.write_text(text, encoding="utf-8")
    assert [arm.name for arm in read_plan(path).arms] == ["float32", "uniform"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_import_from_fedpara_edge_alone(page: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
        imported = re.findall(r"^\s*(?:from|import) (\w+)", block, re.MULTILINE)
        assert not {"device_runtime", "export"} & set(imported)
        assert not re.findall(r"from fedpara_edge\.(?!nn\b)", block)


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_pages_show_have_the_options_that_they_name(page: str) -> None:
    text = read(page).replace("\\\n", " ")
    for line in re.findall(r"(?:^    |^\$ |do |`)(?:\w+=\S+ )*fedpara-edge ([^`\n;|>\\]+)", text, re.MULTILINE):
        parse(shlex.split(line, comments=True))
    for name, rows in re.findall(r"^\| option of `(\w+)` .*\n((?:\|.*\n)+)", text, re.MULTILINE):
        for row in rows.splitlines():
            for option in re.findall(r"`(--[\w-]+)", row.split("|")[1]):
                parse([name, option, "1"])
