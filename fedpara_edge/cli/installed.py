"""What is installed on this machine, what it can run, and what to install for the rest."""

from __future__ import annotations

import platform
import struct
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from fedpara_edge.errors import InputError


@dataclass(frozen=True)
class Capability:
    """Something this machine may be able to do.

    Args:
        name: what it is.
        packages: the distributions it needs, any one of the names in a tuple.
        install: what to type when one is missing.
        commands: the commands it stands behind.
    """

    name: str
    packages: tuple[tuple[str, ...], ...]
    install: str
    commands: tuple[str, ...]


DEVICE_64_BIT = "pip install 'fedpara-edge[device]'"
DEVICE_32_BIT = (
    "sudo apt install python3-onnxruntime python3-numpy python3-zstandard python3-venv; "
    "python3 -m venv --system-site-packages fedpara; fedpara/bin/pip install fedpara-edge"
)
"""Nobody builds wheels of onnxruntime for 32-bit systems, but Debian 13 and Raspberry Pi OS have a package."""

POINTER_BITS = 8 * struct.calcsize("P")
"""Of this Python; a 32-bit Raspberry Pi OS runs on a 64-bit kernel, which is what `platform.machine` tells of."""

_TRAINING = ("onnxruntime-training-cpu", "onnxruntime-training")
ENGINES = {"onnxruntime": ("onnxruntime", *_TRAINING), "ort-training": _TRAINING}
"""The engines, each with the distributions that any one of runs it."""

CAPABILITIES = (
    Capability(
        "server",
        (("numpy",), ("click",), ("safetensors",), ("zstandard",)),
        "pip install fedpara-edge",
        ("split", "aggregate", "apply", "codec", "inspect", "doctor"),
    ),
    Capability(
        "device",
        (("onnxruntime", *_TRAINING),),
        DEVICE_64_BIT,
        ("train", "evaluate", "predict"),
    ),
    Capability(
        "export",
        (("torch",), ("onnx",), ("onnxscript",), ("onnxruntime", *_TRAINING)),
        "pip install 'fedpara-edge[export]'",
        ("export", "simulate"),
    ),
    Capability("fold", (("onnx",), ("onnxruntime", *_TRAINING)), "pip install 'fedpara-edge[export]'", ("fold",)),
)


@dataclass(frozen=True)
class Finding:
    """A capability, the versions found for it, and what is missing."""

    capability: Capability
    versions: dict[str, str]
    missing: tuple[str, ...]
    obstacle: str


def find(capability: Capability) -> Finding:
    """Look up the distributions of a capability without importing any."""
    versions: dict[str, str] = {}
    missing = []
    for names in capability.packages:
        found = _versions(names)
        versions |= found
        if not found:
            missing.append(names[0])
    obstacles = (obstacle() for name, obstacle in _OBSTACLES.items() if name in missing)
    return Finding(capability, versions, tuple(missing), next(filter(None, obstacles), ""))


def engines() -> tuple[str, ...]:
    """Names of the engines that run here."""
    return tuple(name for name, distributions in ENGINES.items() if _versions(distributions))


def require_engine(name: str) -> None:
    """Raise unless an engine runs here.

    Raises:
        InputError: none of its distributions is installed; the message has the line to type.
    """
    if name not in engines():
        distribution = ENGINES[name][0]
        remedy = _OBSTACLES[distribution]() or f"type: pip install {distribution}"
        raise InputError(f"engine {name}: expected {distribution} to be installed, found none; {remedy}")


def require(name: str) -> None:
    """Raise unless the capability of that name is installed.

    Raises:
        InputError: a distribution is missing; the message has the line to type.
    """
    capability = next(entry for entry in CAPABILITIES if entry.name == name)
    # Looking up modules is enough where they carry the distributions' names, and saves a device 3 MB and 20 ms.
    if all(_has_module(names[0]) for names in capability.packages):
        return
    finding = find(capability)
    if finding.missing:
        remedy = finding.obstacle or f"type: {capability.install}"
        raise InputError(f"{name}: expected {', '.join(finding.missing)} to be installed, found none; {remedy}")


def _no_training_wheel() -> str:
    """Why onnxruntime-training can't be installed here; empty if it can."""
    system, machine = sys.platform, platform.machine().lower()
    if sys.version_info >= (3, 13):
        return f"onnxruntime-training has no wheel for Python {platform.python_version()}: use Python 3.11 or 3.12"
    if (system, machine) in {("linux", "x86_64"), ("darwin", "arm64"), ("win32", "amd64")}:
        return ""
    return f"onnxruntime-training has no wheel for {system} {machine}: use Linux x86_64, macOS arm64 or Windows"


def _no_wheel() -> str:
    """Why onnxruntime can't be installed by pip here; empty if it can."""
    return "" if POINTER_BITS == 64 else f"onnxruntime has no wheel for {POINTER_BITS}-bit systems: {DEVICE_32_BIT}"


_OBSTACLES = {"onnxruntime": _no_wheel, "onnxruntime-training-cpu": _no_training_wheel}


def _versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Those of them that are installed, with their versions."""
    found = {name: version for name in distributions if (version := _version(name)) is not None}
    if not found and _has_module(distributions[0]):
        return {distributions[0]: "of unknown version"}  # Debian's may come without a distribution's metadata
    return found


def _has_module(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
