"""What an operator sees of a federation: the round that is open, those that were, and the devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedpara_edge.serving.asking import ALIVE_SECONDS
from fedpara_edge.serving.federation import Federation
from fedpara_edge.serving.record import Record
from fedpara_edge.simulation.metrics import Event

MOST_ROUNDS = 50
"""Past rounds that are shown."""
_SHOWN = (
    *("round", "updates", "rejected", "stragglers", "examples", "train_loss", "accuracy", "loss", "up_bytes"),
    *("down_bytes", "dense_bytes", "seconds"),
)
"""Fields of a round (`fedpara_edge.simulation.metrics`) that are shown."""


def overview(federation: Federation, record: Record, *, now: float) -> dict[str, Any]:
    """The state of a federation, plain data for `json.dumps`, which changes when there is something else to see.

    Args:
        federation: Federation.
        record: Record of its rounds.
        now: Time in seconds since 1970.
    """
    rounds, round_ = record.rounds, federation.round
    manifest = federation.bundle.manifest
    return {
        "model": manifest.model,
        "round": federation.number,
        "rounds_wanted": federation.rounds_wanted,
        "phase": federation.phase,
        "error": federation.error,
        "updates": round_.count,
        "wanted": federation.current.wanted,
        "fewest": federation.current.fewest,
        "asked": len(round_.asked),
        "opened": round_.opened,
        "is_evaluated": record.is_evaluated,
        "is_evaluating": record.is_evaluating,
        "privacy": federation.privacy,
        "total": _total(rounds, dense_bytes=4 * manifest.layout.dense_parameters),
        "rounds": [{name: each.get(name) for name in _SHOWN} for each in reversed(rounds[-MOST_ROUNDS:])],
        "devices": [
            {
                "client": device.client,
                "is_here": device.seen is not None and now - device.seen < ALIVE_SECONDS,
                "has_sent": round_.has_sent(device.client, federation.number),
                "is_asked": device.client in round_.asked,
                "round": device.round,
                "error": device.error,
            }
            for device in federation.devices.all
        ],
    }


def _total(rounds: Iterable[Event], *, dense_bytes: int) -> dict[str, int]:
    """Bytes of all rounds, and those of as many transfers of the dense model in float32."""
    total = dict.fromkeys(("up_bytes", "down_bytes", "dense_up_bytes", "dense_down_bytes"), 0)
    for each in rounds:
        total["up_bytes"] += each["up_bytes"] or 0
        total["down_bytes"] += each["down_bytes"] or 0
        total["dense_up_bytes"] += each["dense_bytes"] or 0
        total["dense_down_bytes"] += dense_bytes * (each["participants"] or 0)
    return total
