"""What an operator sees of a federation: the round that is open, those that were, and the devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpara_edge.serving.federation import ALIVE_SECONDS, Federation

MOST_ROUNDS = 50
"""Past rounds that are shown."""


def overview(federation: Federation, *, now: float) -> dict[str, Any]:
    """The state of a federation, plain data for `json.dumps`.

    Args:
        federation: Federation.
        now: Time in seconds since 1970.
    """
    first = max(federation.number - MOST_ROUNDS, 0)
    past = [_of_round(number, federation.result(number)) for number in range(first, federation.number)]
    return {
        "round": federation.number,
        "phase": federation.phase,
        "error": federation.error,
        "updates": federation.round.count,
        "wanted": federation.wanted,
        "asked": len(federation.round.asked),
        "opened_seconds": None if federation.round.opened is None else round(now - federation.round.opened),
        "rounds": [each for each in reversed(past) if each is not None],
        "devices": [
            {
                "client": device.client,
                "is_here": device.seen is not None and now - device.seen < ALIVE_SECONDS,
                "has_sent": federation.round.has_sent(device.client, federation.number),
                "is_asked": device.client in federation.round.asked,
                "round": device.round,
                "error": device.error,
            }
            for device in federation.devices.all
        ],
    }


def _of_round(number: int, result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A row about a round; None where nothing is known of it."""
    if result is None:
        return None
    accepted = result["accepted"]
    losses = [(update["metrics"]["loss"], update["examples"]) for update in accepted if "loss" in update["metrics"]]
    examples = sum(count for _, count in losses)
    return {
        "round": number,
        "updates": len(accepted),
        "rejected": len(result["rejected"]),
        "stragglers": len(result["stragglers"]),
        "examples": result["examples"],
        "loss": sum(loss * count for loss, count in losses) / examples if examples else None,
        "received_bytes": result["received_bytes"],
        "dense_bytes": result["dense_bytes"],
        "seconds": result["ended"] - result["opened"],
    }
