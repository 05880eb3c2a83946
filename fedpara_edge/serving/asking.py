"""Which devices are asked to train in a round, and why the others are not."""

from __future__ import annotations

import secrets

from fedpara_edge.formats.task import Obstacle, Phase
from fedpara_edge.serving.devices import Devices
from fedpara_edge.serving.openround import OpenRound

ALIVE_SECONDS = 120.0
"""Time after its last request for which a device may be drawn for a round."""


def draw(devices: Devices, places: int | None, *, now: float) -> list[str]:
    """Devices to ask first: some of those that are here, if they are more than there are places.

    Args:
        devices: Devices that joined.
        places: Most devices that are asked in a round; None for no limit.
        now: Time in seconds since 1970.
    """
    here = devices.seen_since(now - ALIVE_SECONDS)
    return secrets.SystemRandom().sample(here, places) if places is not None and places < len(here) else []


def find_obstacle(client: str, current: OpenRound, phase: Phase, *, now: float) -> Obstacle | None:
    """The reason why a device is not to train; None if it is.

    Args:
        client: Name of the device.
        current: Round that is open or being aggregated.
        phase: Phase of that round.
        now: Time in seconds since 1970.
    """
    if phase != "open":
        reasons = {
            "closing": "the updates of this round are being put together",
            "paused": "the federation is paused",
            "finished": "the federation is finished",
        }
        return Obstacle(phase, reasons[phase])
    if current.folder.has_sent(client, current.number):
        return Obstacle("sent", "the update of this device is there; the round is not over yet")
    if (obstacle := current.judge.obstacle(client)) is not None:
        return obstacle
    if client in current.folder.asked:
        return None
    places, overdue_at = current.config.participants, current.overdue_at
    is_overdue = overdue_at is not None and now > overdue_at
    if places is not None and len(current.folder.asked) >= places and not is_overdue:
        return Obstacle("drawn", "other devices were drawn for this round")
    return None
