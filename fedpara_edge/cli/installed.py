"""What is installed on this machine, what it can run, and what to install for the rest."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata

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


CAPABILITIES = (
    Capability(
        "server",
        (("numpy",), ("click",), ("safetensors",)),
        "pip install fedpara-edge",
        ("aggregate", "inspect", "doctor"),
    ),
    Capability(
        "device",
        (("onnxruntime-training-cpu", "onnxruntime-training"),),
        "pip install 'fedpara-edge[device]'",
        ("train", "evaluate"),
    ),
    Capability(
        "export",
        (("torch",), ("onnx",), ("onnxscript",), ("onnxruntime-training-cpu", "onnxruntime-training")),
        "pip install 'fedpara-edge[export]'",
        ("export",),
    ),
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
        found = {name: version for name in names if (version := _version(name)) is not None}
        versions |= found
        if not found:
            missing.append(names[0])
    obstacle = _no_training_wheel() if "onnxruntime-training-cpu" in missing else ""
    return Finding(capability, versions, tuple(missing), obstacle)


def require(name: str) -> None:
    """Raise unless the capability of that name is installed.

    Raises:
        InputError: a distribution is missing; the message has the line to type.
    """
    capability = next(entry for entry in CAPABILITIES if entry.name == name)
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


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
