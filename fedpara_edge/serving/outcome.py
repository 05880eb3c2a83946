"""What comes of a round: the next weights, and `result.json` in its folder, by which devices hear of their updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpara_edge.aggregation.round import LEAST_KEPT, Round, run_round
from fedpara_edge.formats.serverstate import write_control
from fedpara_edge.serving.devices import Devices
from fedpara_edge.serving.folder import ServerFolder
from fedpara_edge.serving.guarding import Guard
from fedpara_edge.serving.openround import OpenRound
from fedpara_edge.serving.refused import without_path
from fedpara_edge.serving.rounds import RoundFolder, read_result


def complete(
    current: OpenRound, closed: list[Path], folder: ServerFolder, guard: Guard, *, clock: Callable[[], float]
) -> tuple[Round, Mapping[str, Any]]:
    """Aggregate a round that is closed, and write all that comes of it.

    Args:
        current: Round.
        closed: Updates to aggregate.
        folder: State folder.
        guard: Demands on updates, with the budget of noise.
        clock: Function that tells the time in seconds since 1970.

    Returns:
        The round as it was aggregated, and the content of its `result.json`.

    Raises:
        FedparaError: It can't be aggregated, or not be written.
    """
    number, config = current.number + 1, current.aggregate
    started = clock()
    done = run_round(
        closed,
        folder.weights(current.number),
        folder.weights(number),
        replace(config, strict=False),
        state=folder.server,
        change=None if config.downlink_codec is None else folder.change(number),
        keep=max(current.config.keep_rounds, LEAST_KEPT),
        gate=current.judge.gate,
        budget=guard.budget,
    )
    write_control(folder.control(number), done.aggregation.state)
    result = _result(done, current.folder, closed=started, ended=clock(), privacy=guard.spent)
    current.folder.finish(result)
    return done, result


def tell_rejected(devices: Devices, done: Round) -> None:
    """Have the devices know of updates that were taken and did not count in the end."""
    for update in done.aggregation.rejected:
        if update.client is not None:
            message = f"update of {update.client!r}: {without_path(update)}"
            devices.judge(update.client, round=None, error=message)


def recall(devices: Devices, current: OpenRound, folder: ServerFolder) -> None:
    """Have the devices know what became of their last updates, as far as the rounds tell that are kept."""
    for number in range(max(current.number - current.config.keep_rounds, 0), current.number):
        result = read_result(folder.round(number)) or {}
        for update in result.get("accepted", ()):
            devices.judge(update["client"], round=number - update["staleness"], error=None)
    for refusal in current.folder.refused:
        devices.judge(refusal.client, round=None, error=refusal.message)
    for device in devices.all:
        if current.folder.has_sent(device.client, current.number):
            devices.judge(device.client, round=current.number, error=None)


def _result(
    done: Round, folder: RoundFolder, *, closed: float, ended: float, privacy: Mapping[str, Any] | None
) -> dict[str, Any]:
    asked, taken = folder.asked, {update.client for update in done.aggregation.accepted}
    refused = {refusal.client: refusal.code for refusal in folder.refused}
    refused |= {str(update.client): update.code for update in done.aggregation.rejected}
    return {
        "opened": folder.opened,
        "closed": closed,
        "ended": ended,
        "asked": len(asked),
        "refused": {client: refused[client] for client in sorted(refused.keys() & asked - taken)},
        "refused_bytes": sum(refusal.bytes for refusal in folder.refused),
        "sent_bytes": folder.sent_bytes,
        "stragglers": sorted(asked - taken - refused.keys()),
        "privacy": privacy,
        **done.to_json(),
    }
