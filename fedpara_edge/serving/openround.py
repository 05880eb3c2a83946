"""The round from whose weights devices train: what it begins with, and what it takes until it may be closed."""

from __future__ import annotations

from dataclasses import dataclass

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.aggregation.staleness import recent
from fedpara_edge.errors import BudgetError
from fedpara_edge.formats.history import NO_HISTORY, History
from fedpara_edge.formats.serverstate import read_state_for
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.serving.config import ServeConfig
from fedpara_edge.serving.content import Content
from fedpara_edge.serving.folder import ServerFolder
from fedpara_edge.serving.guarding import Guard, RoundGuard
from fedpara_edge.serving.rounds import RoundFolder


@dataclass(frozen=True, kw_only=True)
class OpenRound:
    """A round that is open or being aggregated.

    Args:
        number: Number of the round, which is that of its weights.
        base: Weights from which devices train.
        history: Past rounds of which updates may still count.
        content: Files that devices may get.
        folder: Folder of the round.
        counted: SHA-256 of the updates that the rounds before it took, as far as those are kept.
        judge: Judge of its updates.
        config: Conditions on which it closes.
        aggregate: Aggregation of its updates.
        unpaid: Error that says why its noise could not be paid for; None if it could.
        needed: Number of updates that aggregation asked for when it was closed with too few; 0 before.
    """

    number: int
    base: Weights
    history: History
    content: Content
    folder: RoundFolder
    counted: frozenset[str]
    judge: RoundGuard
    config: ServeConfig
    aggregate: AggregateConfig
    unpaid: BudgetError | None
    needed: int = 0

    @property
    def wanted(self) -> int:
        """Number of updates that closes it."""
        return max(self.config.updates, self.needed)

    @property
    def fewest(self) -> int:
        """Number of updates below which it can't be closed."""
        return max(self.aggregate.min_updates, self.needed)

    @property
    def overdue_at(self) -> float | None:
        """Time from which the fewest updates close it, in seconds since 1970; None for never."""
        opened, deadline = self.folder.opened, self.config.deadline
        return None if deadline is None or opened is None else opened + deadline

    def has_taken(self, digest: str) -> bool:
        """Whether it, or a round before it, took the update with this SHA-256."""
        return digest in self.counted or digest in self.folder.digests

    def seconds_left(self, now: float) -> float | None:
        """Time until it may have to be closed; 0 if it has to be now, None if only an update can do that."""
        if self.folder.count >= self.wanted:
            return 0.0
        if self.overdue_at is None or self.folder.count < self.fewest:
            return None
        return max(self.overdue_at - now, 0.0)


def read_round(
    folder: ServerFolder, number: int, *, aggregate: AggregateConfig, config: ServeConfig, guard: Guard
) -> OpenRound:
    """The round that starts from the weights after `number` rounds, from the state folder.

    Raises:
        FedparaError: A file of the folder is damaged, or the list of clients is.
    """
    base = read_weights(folder.weights(number), folder.bundle)
    state = read_state_for(folder.server, base) if number else None
    earlier = range(max(number - config.keep_rounds, 0), number)
    return OpenRound(
        number=number,
        base=base,
        history=recent(state, base, aggregate.max_staleness) if state else NO_HISTORY,
        content=Content(folder, base, keep=config.keep_rounds),
        judge=guard.for_round(),
        unpaid=_why_unpaid(guard, number + 1),
        counted=frozenset(digest for each in earlier for digest in RoundFolder(folder.round(each)).digests),
        folder=RoundFolder(folder.round(number)),
        config=config,
        aggregate=aggregate,
    )


def _why_unpaid(guard: Guard, number: int) -> BudgetError | None:
    try:
        guard.check_budget(number)
    except BudgetError as error:
        return error
    return None
