"""Whether an update that arrived counts: it would be aggregated, and is the one of its device in its round."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.aggregation.screening import read_whole, screen
from fedpara_edge.formats.task import Phase
from fedpara_edge.formats.update import UpdateHeader
from fedpara_edge.serving.openround import OpenRound
from fedpara_edge.serving.refused import RefusedError, without_path

LATE = "wrong_round"
"""Code of an update of a round that is over."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """An update that was taken.

    Args:
        client: Name of the device.
        round: Round of the weights from which it was trained.
        is_new: Whether it was not there before.
    """

    client: str
    round: int
    is_new: bool


def check_phase(phase: Phase) -> None:
    """Refuse updates while a round is aggregated and after the last one.

    Raises:
        RefusedError: It is closing or finished.
    """
    if phase == "closing":
        raise RefusedError("expected a round that is open, found it being aggregated; send it again", status=503)
    if phase == "finished":
        raise RefusedError("expected a round that is open, found the federation finished", status=409, code=LATE)


def read_header(path: Path, current: OpenRound, client: str) -> UpdateHeader:
    """The header of an update that is good, values included, and that of the device which sent it.

    Raises:
        RefusedError: It is not.
    """
    algorithm, gate = current.aggregate.server_algorithm, current.judge.gate
    updates, rejected = screen([path], current.base, algorithm, gate, history=current.history)
    if not rejected:
        readable, rejected = read_whole(updates, current.base)
    if rejected:
        code, reason = rejected[0].code, without_path(rejected[0])
        raise RefusedError(reason, status=409 if code in (LATE, "wrong_base", "duplicate") else 422, code=code)
    header = readable[0][1].header
    if header.client != client:
        raise RefusedError(
            f"expected the name under which this device joined, found {header.client!r}",
            status=403,
            code="unknown_client",
        )
    return header


def check_sender(header: UpdateHeader, digest: str, current: OpenRound) -> None:
    """Refuse a second update of a device in a round, and one of a device that was not drawn for it.

    Raises:
        RefusedError: It is such a one.
    """
    found = current.folder.digest_of(header.client, header.round)
    if found not in (None, digest):
        raise RefusedError(
            "expected one of each device in a round, found another one before it", status=409, code="conflict"
        )
    if header.round == current.number and header.client not in current.folder.asked:
        raise RefusedError(
            "expected a device that was drawn for the round, found another", status=409, code="not_drawn"
        )
