"""What is shipped: the wheel and the sdist, their metadata, and what the files around the code say of it."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from phone_tools import WEB, run_node

from fedpara_edge import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("device_runtime", "export", "fedpara_edge")
NOT_COPIED = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "_build", "build", "demo-run", "dist", "node_modules", "page"
)
HIDDEN = (".pre-commit-config.yaml",)
DATA = {
    "device_runtime/py.typed",
    "export/py.typed",
    "fedpara_edge/demo/LICENSE.fashion-mnist",
    "fedpara_edge/demo/fashion_mnist_12k.npz",
    "fedpara_edge/py.typed",
    *(
        f"fedpara_edge/serving/operator_page/{name}"
        for name in ("index.html", "look.css", "operator.css", "operator.js")
    ),
}
"""All that is in the packages besides modules."""
PAGE = "device_runtime/web/page"
"""Place of the phone's page, which `make wheel` builds."""
PARTS_OF_THE_PAGE = {"index.html", "device.js", "codecs/codec.js", "vendor/zstd.js", "vendor/zstd.LICENSE"}
FOR_THE_TESTS = {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    ".pre-commit-config.yaml",
}
FOLDERS_FOR_THE_TESTS = ("benchmarks", "docs", "examples", "plans", "tests", *PACKAGES)


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    page: set[str]
    """Files of the page that it was built with."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of a copy of the checkout with the phone's page, and the wheel of that sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_COPIED)
    for name in HIDDEN:
        shutil.copy(ROOT / name, folder / "checkout")
    page = folder / "checkout" / PAGE
    run_node(WEB / "build.mjs", page)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), "checkout"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return Built(wheel, sdist, {f"{PAGE}/{path.relative_to(page)}" for path in page.rglob("*") if path.is_file()})


def of_checkout(*folders: str) -> set[str]:
    """Names of files under folders of the checkout, but for what is made there."""
    paths = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if not is_made(path)}


def is_made(path: Path) -> bool:
    in_plans = path.parts[0] == "plans" and path.suffix in (".html", ".npz", ".png")
    return in_plans or path.suffix == ".pyc" or bool({"_build", ".kept", "node_modules", "page"} & set(path.parts))


@pytest.mark.slow
def test_the_wheel_has_the_three_packages_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == set(PACKAGES)
    assert names == {name for name in of_checkout(*PACKAGES) if name.endswith(".py")} | DATA | built.page
    assert built.page >= {f"{PAGE}/{name}" for name in PARTS_OF_THE_PAGE}


@pytest.mark.slow
def test_the_page_brings_what_runs_on_it_and_not_what_it_is_made_or_measured_with(built: Built) -> None:
    below = {name.removeprefix(f"{PAGE}/vendor/").partition("/")[0] for name in built.page if "/vendor/" in name}
    assert below == {"onnxruntime-web", "zstd.js", "zstd.LICENSE"}


def test_the_lockfile_pins_packages_by_their_content_and_names_no_host() -> None:
    text = (WEB / "package-lock.json").read_text(encoding="utf-8")
    assert "://" not in text
    packages = {name: entry for name, entry in json.loads(text)["packages"].items() if name}
    assert [name for name, entry in packages.items() if "integrity" not in entry] == []


@pytest.mark.slow
def test_a_server_hands_out_the_page_of_its_wheel(built: Built, tmp_path: Path) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        wheel.extractall(tmp_path)
    read = (
        "from fedpara_edge.cli.serve import installed_page; from fedpara_edge.serving.page import Page; "
        "print(Page(installed_page()).find('', 'br').path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", read], cwd=tmp_path, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert Path(done.stdout.strip()) == tmp_path / PAGE / "index.html", done.stderr


@pytest.mark.slow
def test_the_sdist_has_what_the_tests_need_and_nothing_made(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    made = {name for name in names if name.startswith("fedpara_edge.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == FOR_THE_TESTS | of_checkout(*FOLDERS_FOR_THE_TESTS) | built.page


@pytest.mark.slow
def test_twine_takes_both(built: Built) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", str(built.wheel), str(built.sdist)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_metadata_say_what_it_is(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode("utf-8"))
    assert metadata["Name"] == "fedpara-edge"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE", "fedpara_edge/demo/LICENSE.fashion-mnist"]
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    assert metadata["Keywords"]


def test_every_file_tells_the_same_version() -> None:
    (latest, *_) = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {latest, citation["version"]} == {__version__}


def test_the_hooks_are_the_checks_that_make_test_begins_with() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"] for repository in hooks for hook in repository["hooks"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    recipes = {
        name: lines.split("\n") for name, lines in re.findall(r"^(\w+):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    }
    parts = [part for part in recipes["test"][0].split() if part in recipes]
    commands = [line.strip() for part in parts for line in recipes[part] if line]
    assert entries == commands[: len(entries)]
    tests = [commands[len(entries)], *recipes["slow"]]
    assert [line.strip() for line in tests if line] == ['$(PYTEST) -m "not slow"', "$(PYTEST) -m slow"]


def test_every_extra_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {re.split(r"[\[<>=; ]", wanted)[0] for extra in extras.values() for wanted in extra} - {"fedpara-edge"}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").casefold()
    assert [name for name in sorted(names) if f"\n{name.casefold()}==" not in pins] == []
