"""`fedpara-edge doctor`: what this machine can run."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import click

from fedpara_edge import __version__
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.installed import CAPABILITIES, DEVICE_32_BIT, DEVICE_64_BIT, engines, find
from fedpara_edge.cli.output import emit, json_option


@click.command("doctor", cls=Command)
@json_option
def command(json: bool) -> None:
    """Tell what this machine can run, and the line to type for what it can't."""
    findings = [find(capability) for capability in CAPABILITIES]
    clash = sorted({name for name in ("onnxruntime", "onnxruntime-training", "onnxruntime-training-cpu") if _has(name)})
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [f"fedpara-edge {__version__} on {machine}"]
    for finding in findings:
        capability = finding.capability
        commands = ", ".join(capability.commands)
        versions = ", ".join(f"{name} {version}" for name, version in finding.versions.items())
        if not finding.missing:
            lines.append(f"yes  {capability.name}: {commands} ({versions})")
        else:
            remedy = finding.obstacle or capability.install
            lines.append(f"no   {capability.name}: {commands}: missing {', '.join(finding.missing)}: {remedy}")
    running = engines()
    lines += [
        f"engines here: {', '.join(running) or 'none'}",
        f"on a Raspberry Pi, 64-bit: {DEVICE_64_BIT}",
        f"on a Raspberry Pi, 32-bit (Debian 13): {DEVICE_32_BIT}",
    ]
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
                "available": not finding.missing,
                "commands": finding.capability.commands,
                "versions": finding.versions,
                "missing": finding.missing,
                "install": finding.capability.install,
                "obstacle": finding.obstacle,
            }
            for finding in findings
        },
        "engines": running,
        "raspberry_pi": {"64-bit": DEVICE_64_BIT, "32-bit": DEVICE_32_BIT},
        "clash": clash if len(clash) > 1 else [],
    }
    emit(result, "\n".join(lines), as_json=json)


def _has(distribution: str) -> bool:
    return any(True for _ in metadata.distributions(name=distribution))
