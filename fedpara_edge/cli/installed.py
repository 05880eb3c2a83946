"""What this machine can run with what is installed, and what to type for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

from fedpara_edge.errors import InputError
from fedpara_edge.installation import OWN_PACKAGES, check_package, install_line, obstacle


@dataclass(frozen=True)
class Capability:
    """Something that a machine may be able to do.

    Attributes:
        name: Name of the capability.
        packages: Distributions that it needs; any one of a tuple is enough.
        extra: Extra of fedpara-edge that installs them; empty for none.
        commands: Commands that need it.
        own: Packages of this installation that the commands import.
    """

    name: str
    packages: tuple[tuple[str, ...], ...]
    extra: str
    commands: tuple[str, ...]
    own: tuple[str, ...] = ()


_TRAINING = ("onnxruntime-training-cpu", "onnxruntime-training")
ENGINES = {"onnxruntime": ("onnxruntime", *_TRAINING), "ort-training": _TRAINING}
"""Distributions by engine; any one of them runs it."""

CAPABILITIES = (
    Capability(
        "server",
        (("numpy",), ("click",), ("safetensors",), ("zstandard",)),
        "",
        ("split", "aggregate", "merge", "finalize", "apply", "audit", "codec", "inspect", "report", "doctor"),
    ),
    Capability(
        "device",
        (("onnxruntime", *_TRAINING),),
        "device",
        ("train", "evaluate", "predict", "device"),
        ("device_runtime",),
    ),
    Capability(
        "export",
        (("torch",), ("onnx",), ("onnxscript",), ("onnxruntime", *_TRAINING)),
        "export",
        ("export", "simulate", "advise", "demo"),
        OWN_PACKAGES,
    ),
    Capability("fold", (("onnx",), ("onnxruntime", *_TRAINING)), "export", ("fold",), OWN_PACKAGES),
    Capability("data", (("pillow",), ("pyarrow",), ("soundfile",)), "data", ("data",), ("device_runtime",)),
    Capability("trust", (("tuf",), ("securesystemslib",), ("cryptography",)), "trust", ("keys", "publish")),
    Capability("serve", (("starlette",), ("uvicorn",), ("segno",), ("cryptography",)), "serve", ("serve", "invite")),
    Capability("privacy", (("dp-accounting",),), "privacy", ("aggregate",)),
    Capability("fleet", (("flwr",), ("onnxruntime", *_TRAINING)), "fleet", ("fleet",), ("device_runtime",)),
    Capability("flower", (("flwr",), ("ray",)), "ray", ("simulate",)),
    Capability("hub", (("huggingface_hub",),), "hub", ("push", "pull")),
    Capability("report", (("matplotlib",),), "report", ("simulate", "codec")),
)


@dataclass(frozen=True)
class Finding:
    """What was found of a capability.

    Attributes:
        capability: The capability.
        versions: Version of each distribution that is there.
        missing: Distributions that are not.
        obstacle: Reason why pip can't install them here, with the remedy; empty if nothing is known against it.
        faults: Reason why each distribution that is there can't be imported, as far as this was tried.
    """

    capability: Capability
    versions: dict[str, str]
    missing: tuple[str, ...]
    obstacle: str
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def available(self) -> bool:
        """Whether nothing is missing or faulty."""
        return not self.missing and not self.faults

    @property
    def install(self) -> str:
        """What to type for all that the capability needs."""
        extra = self.capability.extra
        return install_line(extra, torch=extra == "export" and not _versions(("torch",)))


def find(capability: Capability) -> Finding:
    """Look up the distributions of a capability without importing any."""
    versions: dict[str, str] = {}
    missing = []
    for names in capability.packages:
        found = _versions(names)
        versions |= found
        if not found:
            missing.append(names[0])
    return Finding(capability, versions, tuple(missing), next(filter(None, map(obstacle, missing)), ""))


def find_working(capability: Capability) -> Finding:
    """Look up the distributions of a capability and import each in a process of its own."""
    from fedpara_edge.cli.trial import faults

    found = find(capability)
    return replace(found, faults=faults(found.versions))


def engines() -> tuple[str, ...]:
    """Names of the engines whose distributions are installed."""
    return tuple(name for name, distributions in ENGINES.items() if _versions(distributions))


def working_engines() -> tuple[str, ...]:
    """Names of the engines that are installed and can be imported."""
    from fedpara_edge.cli.trial import faults

    return tuple(
        name
        for name, distributions in ENGINES.items()
        if (found := _versions(distributions)) and not faults(found) and not faults(distributions[:1])
    )


def require_engine(name: str) -> None:
    """Raise unless an engine runs here.

    Raises:
        InputError: None of its distributions is installed; the message has the line to type.
    """
    if name not in engines():
        distribution = ENGINES[name][0]
        remedy = obstacle(distribution) or f"type: {install_line('device')}"
        raise InputError(f"engine {name}: expected {distribution} to be installed, found none; {remedy}")


def require(name: str) -> None:
    """Raise unless the capability of that name is installed, and its packages are those of this installation.

    Raises:
        InputError: A distribution is missing, and the message has the line to type; or another module is found in place
            of a package.
    """
    capability = next(entry for entry in CAPABILITIES if entry.name == name)
    for package in capability.own:
        check_package(package)
    # Looking up modules is enough where they carry the distributions' names, and saves a device 3 MB and 20 ms.
    if all(_has_module(names[0]) for names in capability.packages):
        return
    finding = find(capability)
    if finding.missing:
        remedy = finding.obstacle or f"type: {finding.install}"
        raise InputError(f"{name}: expected {', '.join(finding.missing)} to be installed, found none; {remedy}")


def _versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Versions of those that are installed."""
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
