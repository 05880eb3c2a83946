"""Bytes of real files that participants download.

Where the server publishes whole weights, each participant takes the file of the round. Where it publishes changes, a
participant that has the weights of an earlier round takes all changes since, or what one without any takes: the newest
whole weights that there are, or the initial ones, and the changes after them, whichever is fewer bytes.
"""

from __future__ import annotations

from collections.abc import Sequence


def download_bytes(
    round: int,
    held: int | None,
    *,
    weights_bytes: Sequence[int],
    change_bytes: Sequence[int],
    snapshot_every: int,
) -> int:
    """Bytes that one participant downloads.

    Args:
        round: Round whose weights the participant needs.
        held: Round whose weights it has; None for none.
        weights_bytes: Size of the whole weights of each round, from 0 on.
        change_bytes: Size of the change from the round before to each round, 0 for round 0; empty for no changes.
        snapshot_every: Rounds between whole weights that are kept; 0 to keep those of every round.

    >>> sizes = {"weights_bytes": [100, 100, 100], "change_bytes": [0, 30, 30]}
    >>> [download_bytes(2, held, **sizes, snapshot_every=0) for held in (None, 0, 1)]
    [100, 60, 30]
    >>> download_bytes(2, None, **sizes, snapshot_every=4)
    160
    >>> download_bytes(2, None, weights_bytes=[1, 100, 100], change_bytes=[0, 30, 30], snapshot_every=0)
    61
    """
    newest = round - round % (snapshot_every or 1)
    starts = {newest, 0} if change_bytes else {newest}
    from_whole = min(weights_bytes[start] + sum(change_bytes[start + 1 : round + 1]) for start in starts)
    return from_whole if held is None else min(from_whole, sum(change_bytes[held + 1 : round + 1]))
