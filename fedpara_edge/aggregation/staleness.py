"""Late updates: trained from the weights of an earlier round, and counted for less.

With τ the rounds that passed since (its *staleness*), the change d of an update counts as

    s(τ) d,    s(τ) = 1 / √(1 + τ)

whatever its weight in the mean: the discount is not made up for, so a round of late updates only moves less. This is
FedBuff's staleness scaling (Nguyen et al. 2022, arXiv 2106.06639), which sums the scaled changes and divides by their
number. What is added is the change since the update's own base, never its weights.

An update has one chance: the server state remembers of each round from which weights it started and whose updates of it
have counted (`formats.history`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedpara_edge.errors import InputError
from fedpara_edge.formats.history import History, Past
from fedpara_edge.formats.serverstate import ServerState
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights


def discount(rounds: int) -> float:
    """s(τ) of an update that is some rounds late.

    >>> discount(0), discount(3)
    (1.0, 0.5)
    """
    return 1 / math.sqrt(1 + rounds)


def discounted(update: Update, weights: Weights) -> Update:
    """An update of some weights or earlier ones, for as much as it counts."""
    late = weights.round - update.header.round
    return update.scaled([(0, weights.layout.shared_parameters, discount(late))]) if late else update


def recent(state: ServerState | None, base: Weights, max_staleness: int) -> History:
    """Past rounds of which updates may still count, from the state that belongs with the weights of a round.

    Raises:
        InputError: The model has factors of updates, which mean something else in each round.
    """
    if max_staleness and base.layout.held:
        raise InputError(
            f"expected 0 for a model of kind update, whose factors have other directions in each round, found "
            f"{max_staleness}; leave it out",
            key="max_staleness",
        )
    history = {} if state is None else state.history
    return {number: past for number, past in history.items() if base.round - max_staleness <= number < base.round}


def following(history: History, base: Weights, accepted: Iterable[tuple[str, int]], max_staleness: int) -> History:
    """Past rounds of which updates may count in the next round.

    Args:
        history: Past rounds of which updates could count in this one.
        base: Weights from which this round started.
        accepted: Client of each update that counted in it, and by how many rounds it was late.
        max_staleness: Most rounds by which an update may be late.
    """
    rounds = {**history, base.round: Past(base=base.base, counted=frozenset())}
    counted = {number: set(past.counted) for number, past in rounds.items()}
    for client, late in accepted:
        counted[base.round - late].add(client)
    return {
        number: Past(base=past.base, counted=frozenset(counted[number]))
        for number, past in rounds.items()
        if number > base.round - max_staleness
    }
