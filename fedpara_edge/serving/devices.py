"""The devices of a federation: who joined, who was here lately, and what became of the last round of each.

`devices.jsonl` has a line of JSON for each device that joined: {"client": name, "proof": SHA-256 of a secret that it
made, "joined": seconds since 1970}. Who has the secret may join under the name again, as a device does that was not
told that it had joined. A line is on the disk before the device is told; one that a kill cut short is cut off. All else
is of the running server alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.errors import InputError
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.storage.lines import append_lines, read_lines


@dataclass
class Device:
    """What is known of a device.

    Args:
        client: Name of the device.
        proof: SHA-256 of the device's secret, hexadecimal.
        joined: Time at which it joined, in seconds since 1970.
        seen: Time of its last request, likewise; None if there was none since the server began.
        round: Round of its last update that was taken; None before.
        error: Reason why its last update was refused; None if it was not.
    """

    client: str
    proof: str
    joined: float
    seen: float | None = None
    round: int | None = None
    error: str | None = None


class Devices:
    """The devices that joined.

    Args:
        path: Journal, which need not exist.

    Raises:
        InputError: The journal is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._appending = threading.Lock()
        self._devices: dict[str, Device] = {}
        self._read()

    def __len__(self) -> int:
        return len(self._devices)

    def __contains__(self, client: str) -> bool:
        return client in self._devices

    @property
    def all(self) -> list[Device]:
        """All devices, in the order in which they joined."""
        return list(self._devices.values())

    def join(self, client: str, proof: str, *, now: float) -> None:
        """Add a device, unless it is there already.

        Raises:
            RefusedError: Another device has the name.
            FedparaError: The disk refuses the write.
        """
        with self._appending:
            if (found := self._devices.get(client)) is not None:
                if found.proof != proof:
                    raise RefusedError(
                        f"client: expected a name that no other device has, found {client!r}; choose another",
                        status=409,
                    )
                return
            append_lines(self._path, [{"client": client, "proof": proof, "joined": now}])
            self._devices[client] = Device(client, proof, now)

    def see(self, client: str, *, now: float) -> None:
        """Remember that a device was here."""
        if (device := self._devices.get(client)) is not None:
            device.seen = now

    def judge(self, client: str, *, round: int | None, error: str | None) -> None:
        """Remember what became of an update: that it was taken for a round, or why it was refused."""
        if (device := self._devices.get(client)) is not None:
            device.error = error
            device.round = device.round if round is None else round

    def seen_since(self, time: float) -> list[str]:
        """Names of the devices that were here since then."""
        return [device.client for device in self.all if device.seen is not None and device.seen >= time]

    def _read(self) -> None:
        remedy = "restore it from a copy, or delete it and have all devices join again"
        for number, found in enumerate(read_lines(self._path, remedy=remedy), 1):
            try:
                client, proof, joined = found["client"], found["proof"], float(found["joined"])
                if not isinstance(client, str) or not isinstance(proof, str):
                    raise TypeError("no name")
            except (KeyError, OverflowError, TypeError, ValueError) as error:
                raise InputError(f"{self._path}: line {number}: expected a device, found {error}; {remedy}") from error
            self._devices[client] = Device(client, proof, joined)
