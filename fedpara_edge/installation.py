"""How fedpara-edge is installed: which packages are its own, where it came from, and what to type for more of it.

`export` and `device_runtime` are general names at the top of site-packages, so that a file `export.py` in the folder of
a script, or in the working directory of `python -m fedpara_edge`, is found instead. `check_package` refuses that one
before it runs.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import struct
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from fedpara_edge.errors import InputError

DISTRIBUTION = "fedpara-edge"
OWN_PACKAGES = ("export", "device_runtime")
"""The packages that are installed beside this one."""

POINTER_BITS = 8 * struct.calcsize("P")
"""Bits of a pointer of this Python; `platform.machine` names the kernel, which 32-bit Raspberry Pi OS has in 64."""

_PLACE = Path(__file__).resolve().parents[1]
_CPU_TORCH = "CPU_INDEX is the index of PyTorch's install page for pip and CPU; the default one has CUDA, 5.6 GB"


def check_package(name: str) -> None:
    """Raise unless `import name` finds the package of this installation; nothing is imported.

    Raises:
        InputError: Another module of that name is found first, or none is.
    """
    expected = _PLACE / name
    found = find_package(name)
    if found is None:
        raise InputError(f"{expected}: expected a package of {DISTRIBUTION}, found none; type: {install_line()}")
    if found != expected:
        raise InputError(
            f"{found}: expected no module with the name of {DISTRIBUTION}'s package {name!r}, found one that shadows "
            f"{expected}; rename it or start elsewhere"
        )


def find_package(name: str) -> Path | None:
    """Path of the folder or file that `import name` finds, or has found; None if there is none."""
    loaded = sys.modules.get(name)
    spec = find_spec(name) if loaded is None else loaded.__spec__
    origin = (spec and spec.origin) or getattr(loaded, "__file__", None)
    if origin is not None:
        path = Path(origin).resolve()
        return path.parent if path.name == "__init__.py" else path
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return Path(folders[0]).resolve() if folders else None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an installation came from; an index if neither is given.

    Attributes:
        checkout: Folder with the sources.
        editable: Whether the checkout is run in place.
        url: Address of an archive or a repository, as pip takes it.
    """

    checkout: Path | None = None
    editable: bool = False
    url: str = ""

    @property
    def is_here(self) -> bool:
        """Whether the checkout or the file is still where it was."""
        file = self.url.startswith("file:") and _path_of(self.url)
        return (self.checkout / "pyproject.toml").is_file() if self.checkout else not file or file.exists()


def find_origin() -> Origin:
    """Where this installation came from, by the record that pip keeps (PEP 610)."""
    if (_PLACE / "pyproject.toml").is_file():
        return Origin(checkout=_PLACE, editable=True)
    record = _direct_url()
    url = str(record.get("url", ""))
    if "dir_info" in record:
        return Origin(checkout=_path_of(url))
    if "vcs_info" in record:
        return Origin(url=f"{record['vcs_info'].get('vcs')}+{url}@{record['vcs_info'].get('commit_id')}")
    return Origin(url=url)


def install_line(extra: str = "", *, torch: bool = False) -> str:
    """What to type on this machine for an extra of the distribution, with the tested versions if they are known.

    Args:
        extra: Name of the extra; empty for none.
        torch: Whether PyTorch is to be installed with it, whose default build for Linux brings CUDA along.
    """
    origin = find_origin()
    constraints, requirement, remark = _options(origin, extra, elsewhere=not origin.is_here)
    line = f"{_pip()} install {constraints}{requirement}"
    if torch and sys.platform == "linux":
        # Without its dependencies, as the CPU index need not have the pinned versions of them.
        line = f"{_pip()} install --no-deps {constraints}--index-url CPU_INDEX torch && {line}"
        remark = f"{_CPU_TORCH}; {remark}" if remark else _CPU_TORCH
    return f"{line} # {remark}" if remark else line


def raspberry_pi_lines() -> dict[str, str]:
    """What to type on a Raspberry Pi, by the bits of its system.

    Nobody builds wheels of onnxruntime for 32-bit systems, but Debian 13 and Raspberry Pi OS have a package. numpy is
    Debian's there too, so the tested versions do not apply.
    """
    origin = find_origin()
    constraints, requirement, remark = _options(origin, "device", elsewhere=True)
    _, bare, _ = _options(origin, "", elsewhere=True)
    remark = f" # {remark}" if remark else ""
    return {
        "64-bit": f"pip install {constraints}{requirement}{remark}",
        "32-bit": "sudo apt install python3-onnxruntime python3-numpy python3-zstandard python3-venv; "
        f"python3 -m venv --system-site-packages fedpara; fedpara/bin/pip install {bare}{remark}",
    }


def _options(origin: Origin, extra: str, *, elsewhere: bool) -> tuple[str, str, str]:
    """The option of `pip install` for the tested versions, with a space after it, the requirement, and a remark.

    Args:
        origin: Origin of this installation.
        extra: Name of the extra; empty for none.
        elsewhere: Whether the checkout or the file has to be brought first, which the remark then says.
    """
    suffix = f"[{extra}]" if extra else ""
    if origin.checkout is not None:
        if elsewhere:
            return "-c constraints.txt ", shlex.quote(f".{suffix}"), "in a copy of the checkout"
        constraints = f"-c {shlex.quote(str(origin.checkout / 'constraints.txt'))} "
        return constraints, f"{'-e ' if origin.editable else ''}{shlex.quote(f'{origin.checkout}{suffix}')}", ""
    if elsewhere and origin.url.startswith("file:"):
        return "", shlex.quote(f"./{_path_of(origin.url).name}{suffix}"), "beside a copy of that file"
    return "", shlex.quote(f"{DISTRIBUTION}{suffix}" + (f" @ {origin.url}" if origin.url else "")), ""


def _path_of(url: str) -> Path:
    from urllib.request import url2pathname  # 20 ms that a device need not spend

    return Path(url2pathname(urlsplit(url).path))


def obstacle(distribution: str) -> str:
    """Why pip can't install a distribution on this machine, with the remedy; empty if nothing is known against it."""
    if distribution == "onnxruntime" and POINTER_BITS != 64:
        return f"onnxruntime has no wheel for {POINTER_BITS}-bit systems: {raspberry_pi_lines()['32-bit']}"
    if not distribution.startswith("onnxruntime-training"):
        return ""
    system, machine = sys.platform, platform.machine().lower()
    if sys.version_info >= (3, 13):
        lacking, remedy = f"Python {platform.python_version()}", "Python 3.11 or 3.12"
    elif (system, machine) not in {("linux", "x86_64"), ("darwin", "arm64"), ("win32", "amd64")}:
        lacking, remedy = f"{system} {machine}", "Linux x86_64, macOS arm64 or Windows"
    else:
        return ""
    return f"{distribution} has no wheel for {lacking}: use engine onnxruntime, or {remedy}"


def known_fault(distribution: str, version: str) -> str:
    """What is known of a version that can't be imported on this machine, with the remedy; empty if nothing is."""
    here = (sys.platform, platform.machine().lower())
    if (distribution, version) != ("onnxruntime", "1.21.0") or here != ("linux", "aarch64"):
        return ""
    # github.com/microsoft/onnxruntime/issues/23957 and 24112; 1.20 and 1.22 run there
    return "its wheel crashes on a Raspberry Pi 4 and older: pip install 'onnxruntime!=1.21.0'"


def _direct_url() -> dict[str, dict[str, str]]:
    from importlib import metadata

    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return {}
    record: dict[str, dict[str, str]] = json.loads(text) if text else {}
    return record


def _pip() -> str:
    """The command for the pip of this Python."""
    found = shutil.which("pip")
    own = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip" if own else f"{shlex.quote(sys.executable)} -m pip"
