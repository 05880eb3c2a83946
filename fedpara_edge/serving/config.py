"""When rounds open and close, and what a device may ask of the server: `ServeConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from fedpara_edge.errors import InputError
from fedpara_edge.options import check, option


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a server runs its rounds.

    A round closes when it has `updates`, or after its deadline when it has the fewest that count
    (`AggregateConfig.min_updates`), or with the first update that makes them as many.

    Args:
        updates: Number of updates that closes a round.
        participants: Most devices that are asked to train in a round; None for all. More than `updates` leave room for
            some that don't come back.
        deadline: Time of a round in seconds; None for no end.
        rounds: Rounds after which the federation is finished; None for no end.
        join_hours: Time in hours for which a join link is good.
        requests_per_minute: Most requests of one device, or of an address that has no valid token, in a minute.
        keep_rounds: Rounds back for which changes are kept for devices that were away, and update files for audits.

    Raises:
        InputError: A value is out of its range; the key is the option at fault.
    """

    updates: int = option(2, minimum=1, help="Updates that close a round.")
    participants: int | None = option(
        None, minimum=1, unset="all", help="Most devices that are asked to train in a round, drawn at random."
    )
    deadline: float | None = option(
        None, above=0, unset="no end", help="Seconds after which a round closes with --min-updates."
    )
    rounds: int | None = option(None, minimum=1, unset="no end", help="Rounds after which all is finished.")
    join_hours: float = option(24.0, above=0, help="Hours for which the join link is good.")
    requests_per_minute: int = option(
        240, minimum=1, help="Most requests in a minute of one device, or of an address without a valid token."
    )
    keep_rounds: int = option(
        8, minimum=1, help="Rounds back for which updates, and changes for devices that were away, are kept."
    )

    def __post_init__(self) -> None:
        check(self)
        if self.participants is not None and self.participants < self.updates:
            raise InputError(
                f"expected at least {self.updates}, as many as the updates that close a round, found "
                f"{self.participants}",
                key="participants",
            )
