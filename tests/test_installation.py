"""Install lines for every origin of an installation, and packages that another module shadows."""

import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fedpara_edge import installation
from fedpara_edge.cli.installed import require_engine
from fedpara_edge.errors import InputError
from fedpara_edge.installation import check_package, find_package, install_line, obstacle

ROOT = Path(__file__).parents[1]
PIP = f"{sys.executable} -m pip install"
WHEEL = "fedpara_edge-0.2.0-py3-none-any.whl"
HOSTILE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


@pytest.fixture
def installed_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Make it look as if the package were installed in a site-packages, with the record of an origin by pip."""

    class Distribution:
        def __init__(self, record: object) -> None:
            self.record = record

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if self.record is None else json.dumps(self.record)

    def install(record: object) -> None:
        monkeypatch.setattr(installation, "_PLACE", tmp_path / "site-packages")
        monkeypatch.setattr(metadata, "distribution", lambda _: Distribution(record))

    monkeypatch.setattr(installation.shutil, "which", lambda _: None)
    return install


def test_a_checkout_run_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.shutil, "which", lambda _: None)
    assert install_line("device") == f"{PIP} -c {ROOT}/constraints.txt -e '{ROOT}[device]'"
    assert install_line() == f"{PIP} -c {ROOT}/constraints.txt -e {ROOT}"
    assert (ROOT / "constraints.txt").is_file()


def test_a_checkout_that_was_copied_to_site_packages(installed_from, tmp_path: Path) -> None:
    folder = tmp_path / "a checkout"
    installed_from({"url": folder.as_uri(), "dir_info": {}})
    assert install_line("export") == f"{PIP} -c constraints.txt '.[export]' # in a copy of the checkout"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    assert install_line("export") == f"{PIP} -c '{folder}/constraints.txt' '{folder}[export]'"


def test_a_wheel_from_a_file(installed_from, tmp_path: Path) -> None:
    wheel = tmp_path / WHEEL
    installed_from({"url": wheel.as_uri(), "archive_info": {}})
    assert install_line("export") == f"{PIP} './{WHEEL}[export]' # beside a copy of that file"
    wheel.touch()
    assert install_line("export") == f"{PIP} 'fedpara-edge[export] @ {wheel.as_uri()}'"
    on_pi = installation.raspberry_pi_lines()
    assert on_pi["64-bit"] == f"pip install './{WHEEL}[device]' # beside a copy of that file"
    assert on_pi["32-bit"].endswith(f"fedpara/bin/pip install ./{WHEEL} # beside a copy of that file")


@pytest.mark.parametrize(
    ("record", "requirement"),
    [
        (None, "'fedpara-edge[device]'"),
        ({"url": f"https://example.org/{WHEEL}", "archive_info": {}}, f"https://example.org/{WHEEL}"),
        (
            {"url": "https://example.org/fedpara.git", "vcs_info": {"vcs": "git", "commit_id": "0abc"}},
            "git+https://example.org/fedpara.git@0abc",
        ),
    ],
)
def test_what_any_machine_can_reach(record: object, requirement: str, installed_from) -> None:
    installed_from(record)
    expected = requirement if record is None else f"'fedpara-edge[device] @ {requirement}'"
    assert install_line("device") == f"{PIP} {expected}"
    assert installation.raspberry_pi_lines()["64-bit"] == f"pip install {expected}"


def test_without_any_record(installed_from, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_from(None)

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_line() == f"{PIP} fedpara-edge"


def test_the_pip_of_this_python_is_named_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.shutil, "which", lambda name: str(Path(sys.executable).with_name(name)))
    assert install_line().startswith("pip install ")
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/elsewhere/{name}")
    assert install_line().startswith(PIP)


def test_torch_comes_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "platform", "linux")
    cpu, whole = install_line("export", torch=True).split(" && ")
    assert cpu == f"{PIP} --no-deps -c {ROOT}/constraints.txt --index-url CPU_INDEX torch"
    line, remark = whole.split(" # ")
    assert line == install_line("export")
    assert remark.startswith("CPU_INDEX is the index of PyTorch's install page")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert install_line("export", torch=True) == install_line("export")


@pytest.mark.parametrize(
    ("python", "system", "machine", "words"),
    [
        ((3, 12), "linux", "x86_64", ""),
        ((3, 13), "linux", "x86_64", "use engine onnxruntime, or Python 3.11 or 3.12"),
        ((3, 11), "linux", "aarch64", "use engine onnxruntime, or Linux x86_64, macOS arm64 or Windows"),
    ],
)
def test_onnxruntime_training_is_recommended_only_where_it_has_a_wheel(
    python: tuple[int, int], system: str, machine: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(installation.platform, "machine", lambda: machine)
    found = obstacle("onnxruntime-training-cpu")
    assert found.endswith(words)
    assert bool(found) == bool(words)
    assert obstacle("onnxruntime") == ""
    monkeypatch.setattr("fedpara_edge.cli.installed.engines", lambda: ("onnxruntime",))
    with pytest.raises(InputError) as caught:
        require_engine("ort-training")
    assert str(caught.value).endswith(words or install_line("device"))


def test_the_packages_are_those_beside_this_one() -> None:
    for name in installation.OWN_PACKAGES:
        assert find_package(name) == ROOT / name
        check_package(name)


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ahead of ours on the path, with a module and a package that have the names of ours."""
    (tmp_path / "export.py").write_text(HOSTILE)
    (tmp_path / "device_runtime").mkdir()
    (tmp_path / "device_runtime" / "__init__.py").write_text(HOSTILE)
    for name in [name for name in sys.modules if name.partition(".")[0] in installation.OWN_PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_another_module_of_the_name_is_refused_before_it_runs(shadowed: Path) -> None:
    for name, path in (("export", shadowed / "export.py"), ("device_runtime", shadowed / "device_runtime")):
        with pytest.raises(InputError) as caught:
            check_package(name)
        assert str(caught.value).startswith(f"{path}: expected no module with the name of fedpara-edge's package")
        assert f"shadows {ROOT / name}; rename it" in str(caught.value)
        assert name not in sys.modules
    assert not list(shadowed.rglob("ran"))


def test_another_module_of_the_name_that_was_imported_before_is_refused(shadowed: Path) -> None:
    module = importlib.import_module("export")
    assert (shadowed / "ran").exists()
    with pytest.raises(InputError, match=r"export.py: expected no module"):
        check_package("export")
    assert sys.modules["export"] is module


def test_a_mere_folder_of_the_name_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    code = "from fedpara_edge.installation import check_package\ncheck_package('export')\n"
    code += "import export\nprint(export.__path__[0])"
    command = [sys.executable, "-c", f"import sys\nsys.path[:0] = ['.', {str(ROOT)!r}]\n{code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / "export")


def test_a_package_that_is_gone_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "export", raising=False)
    monkeypatch.setattr(installation, "find_spec", lambda _: None)
    with pytest.raises(
        InputError, match=r"export: expected a package of fedpara-edge, found none; type: .*pip install"
    ):
        check_package("export")


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (("export", "mlp", "-o", "out"), "device_runtime"),
        (("train", "b", "--data", "d", "-o", "out"), "device_runtime"),
        (("evaluate", "b", "--data", "d"), "device_runtime"),
        (("predict", "b", "--data", "d", "-o", "out"), "device_runtime"),
        (("fold", "b", "-o", "out"), "export.py"),
        (("split", "d", "-o", "out"), "device_runtime"),
        (("simulate", "plan", "-o", "out"), "device_runtime"),
        (("simulate", "plan", "-o", "out", "--report-only"), "device_runtime"),
    ],
)
def test_commands_refuse_it_from_the_working_directory(arguments: tuple[str, ...], module: str, shadowed: Path) -> None:
    command = [sys.executable, "-m", "fedpara_edge", *arguments]
    done = subprocess.run(command, cwd=shadowed, capture_output=True, text=True, env=_ours(), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {shadowed / module}: expected no module")
    assert len(done.stderr.splitlines()) == 1
    assert not list(shadowed.rglob("ran"))


@pytest.mark.slow
def test_doctor_warns_of_it(shadowed: Path) -> None:
    command = [sys.executable, "-m", "fedpara_edge", "doctor"]
    done = subprocess.run(command, cwd=shadowed, capture_output=True, text=True, env=_ours(), check=True)
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1].strip() for line in warnings] == [
        str(shadowed / name) for name in ("export.py", "device_runtime")
    ]
    done = subprocess.run([*command, "--json"], cwd=shadowed, capture_output=True, text=True, env=_ours(), check=True)
    assert json.loads(done.stdout)["shadowed"].keys() == set(installation.OWN_PACKAGES)
    assert not list(shadowed.rglob("ran"))


def _ours() -> dict[str, str]:
    """The environment in which this checkout is found after the working directory."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
