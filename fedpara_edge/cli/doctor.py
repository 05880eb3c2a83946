"""`fedpara-edge doctor`: what this machine can run."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import click

from fedpara_edge._version import __version__
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.installed import CAPABILITIES, Finding, find_working, working_engines
from fedpara_edge.cli.output import emit, json_option
from fedpara_edge.errors import InputError
from fedpara_edge.installation import OWN_PACKAGES, check_package, known_fault, raspberry_pi_lines


@click.command("doctor", cls=Command)
@json_option
def command(json: bool) -> None:
    """Tell what this machine can run, and the line to type for what it can't."""
    findings = [find_working(capability) for capability in CAPABILITIES]
    clash = sorted({name for name in ("onnxruntime", "onnxruntime-training", "onnxruntime-training-cpu") if _has(name)})
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [f"fedpara-edge {__version__} on {machine}"]
    for finding in findings:
        capability = finding.capability
        commands = ", ".join(capability.commands)
        versions = ", ".join(f"{name} {version}" for name, version in finding.versions.items())
        if finding.available:
            lines.append(f"yes  {capability.name}: {commands} ({versions})")
        else:
            lines.append(f"no   {capability.name}: {commands}: {_fault(finding)}")
    running, on_pi, shadowed = working_engines(), raspberry_pi_lines(), _shadowed()
    lines += [
        f"engines here: {', '.join(running) or 'none'}",
        f"on a Raspberry Pi, 64-bit: {on_pi['64-bit']}",
        f"on a Raspberry Pi, 32-bit (Debian 13): {on_pi['32-bit']}",
    ]
    lines += [f"warning: {message}" for message in shadowed.values()]
    if len(clash) > 1:
        lines.append(f"warning: {' and '.join(clash)} overwrite each other: keep one and reinstall it")
    result = {
        "version": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "capabilities": {
            finding.capability.name: {
                "available": finding.available,
                "commands": finding.capability.commands,
                "versions": finding.versions,
                "missing": finding.missing,
                "faults": dict(finding.faults),
                "install": finding.install,
                "obstacle": finding.obstacle,
            }
            for finding in findings
        },
        "engines": running,
        "raspberry_pi": on_pi,
        "clash": clash if len(clash) > 1 else [],
        "shadowed": shadowed,
    }
    emit(result, "\n".join(lines), as_json=json)


def _fault(finding: Finding) -> str:
    """What is wrong, and what to type."""
    if finding.missing:
        return f"missing {', '.join(finding.missing)}: {finding.obstacle or finding.install}"
    name, reason = next(iter(finding.faults.items()))
    version = finding.versions[name]
    remedy = known_fault(name, version) or "install it again, or another version of it"
    return f"{name} {version} can't be imported: {reason}; {remedy}"


def _shadowed() -> dict[str, str]:
    """Packages in place of which another module is found, each with what is wrong."""
    messages = {}
    for name in OWN_PACKAGES:
        try:
            check_package(name)
        except InputError as error:
            messages[name] = str(error)
    return messages


def _has(distribution: str) -> bool:
    return any(True for _ in metadata.distributions(name=distribution))
