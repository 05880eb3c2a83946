"""Whether an update that arrived counts: it would be aggregated, and is the one of its device in its round."""

from __future__ import annotations

from dataclasses import dataclass

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
