"""Conditions under which a device trains and sends, where Linux tells: power, temperature, load, kind of network.

What the system does not tell is taken for good: a Raspberry Pi has no battery, so that it is on mains power.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.options import check, option

KERNEL = Path("/")
"""Folder in which the kernel tells of the machine, below sys and proc."""
_METERED_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What has to hold before a device trains, and while it does.

    Args:
        mains: Whether it has to be on mains power.
        max_celsius: Temperature of the hottest sensor above which it waits; None for any.
        max_load: Load of the system, per core, above which it waits before it begins; None for any.
        unmetered: Whether it has to have a network that costs nothing by the byte, as NetworkManager says.

    Raises:
        InputError: A value is out of its range.
    """

    mains: bool = option(False, help="Train on mains power only.")
    max_celsius: float | None = option(
        None, above=0, unset="any", help="Temperature in °C of the hottest sensor above which to wait."
    )
    max_load: float | None = option(
        None, above=0, unset="any", help="Load of the system, per core, above which not to begin."
    )
    unmetered: bool = option(False, help="Train and send only over networks that NetworkManager knows as unmetered.")

    def __post_init__(self) -> None:
        check(self)

    def obstacle(self, *, is_training: bool = False, kernel: Path = KERNEL) -> str | None:
        """The reason why not to train or send now; None if there is none.

        Args:
            is_training: Whether a training is under way, which makes a load of its own and sends nothing.
            kernel: Folder in which the kernel tells.
        """
        if self.mains and on_battery(kernel):
            return "on battery"
        if self.max_celsius is not None:
            celsius = hottest(kernel)
            if celsius is not None and celsius > self.max_celsius:
                return f"{celsius:.0f} °C, above {self.max_celsius:g}"
        if is_training:
            return None
        if self.max_load is not None:
            load = load_per_core(kernel)
            if load is not None and load > self.max_load:
                return f"a load of {load:.2f} per core, above {self.max_load:g}"
        return "a metered network" if self.unmetered and is_metered(kernel) else None


def on_battery(kernel: Path = KERNEL) -> bool:
    """Whether the machine has a battery and no supply from the mains that is on."""
    folders = _entries(kernel / "sys" / "class" / "power_supply")
    supplies = [_read(entry / "type") for entry in folders]
    online = [
        _read(entry / "online") == "1" for entry in folders if _read(entry / "type") in ("Mains", "USB", "Wireless")
    ]
    if any(online):
        return False
    discharging = any(_read(entry / "status") == "Discharging" for entry in folders)
    return discharging or (bool(online) and "Battery" in supplies)


def hottest(kernel: Path = KERNEL) -> float | None:
    """Temperature of the hottest sensor in °C; None without one."""
    zones = _entries(kernel / "sys" / "class" / "thermal")
    found = [_read(entry / "temp") for entry in zones if entry.name.startswith("thermal_zone")]
    values = [int(text) / 1000 for text in found if text.lstrip("-").isdecimal()]
    return max(values, default=None)


def load_per_core(kernel: Path = KERNEL) -> float | None:
    """Load of the last minute over the number of cores; None where that is not known."""
    load = _read(kernel / "proc" / "loadavg").partition(" ")[0]
    try:
        return float(load) / (os.cpu_count() or 1)
    except ValueError:
        return None


def is_metered(kernel: Path = KERNEL) -> bool:
    """Whether the network of the default route costs by the byte, as far as NetworkManager knows."""
    lines = [line.split() for line in _read(kernel / "proc" / "net" / "route").splitlines()[1:]]
    device = next((fields[0] for fields in lines if len(fields) > 1 and fields[1] == "00000000"), None)
    return device is not None and _ask_network_manager(device).startswith("yes")


def _ask_network_manager(device: str) -> str:
    nmcli = shutil.which("nmcli")
    if nmcli is None:
        return "unknown"
    command = [nmcli, "-g", "GENERAL.METERED", "device", "show", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_METERED_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip()


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
