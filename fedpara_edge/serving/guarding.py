"""What a server asks of updates beyond that they fit, and what pays for its noise: lists of clients, and budgets.

    ledger/     what was accepted of signed updates (`fedpara_edge.trust.ledger`)
    privacy/    what is spent of privacy budgets (`fedpara_edge.privacy.ledger`, `fedpara_edge.privacy.devices`)

The list of clients is read anew for each round, and within one when it was changed: a client that is added takes part
at once, and of one that is revoked nothing counts in the round that is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.aggregation.gate import Gate, Gates
from fedpara_edge.formats.task import Obstacle
from fedpara_edge.privacy.mechanism import Gaussian

if TYPE_CHECKING:
    from fedpara_edge.privacy.ledger import PrivacyLedger
    from fedpara_edge.trust.clients import Clients
    from fedpara_edge.trust.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Demands:
    """Demands on updates besides that they fit.

    Args:
        allow: List of the clients whose signed updates alone count; None to take any.
        device_privacy: Budget of each device for noise of its own, such as `gaussian:epsilon=4,delta=1e-5`; None to ask
            for no noise.
    """

    allow: Path | None = None
    device_privacy: str | None = None


NOTHING = Demands()


class RoundGuard:
    """The judge of the updates of a round.

    Args:
        gate: Gate that they have to pass; None for none.
        clients: Clients that may take part; None for all.
    """

    def __init__(self, gate: Gate | None, clients: Clients | None) -> None:
        self.gate, self._clients = gate, clients

    @property
    def run(self) -> str | None:
        """Name of the run that updates are signed for; None if they are not."""
        return None if self._clients is None else self._clients.run

    def obstacle(self, client: str) -> Obstacle | None:
        """The reason why nothing would be taken of a device; None if something would."""
        if self._clients is None:
            return None
        listed = self._clients.by_name.get(client)
        if listed is None:
            found = f"expected a device on the server's list, found {client!r}; have its public key added"
            return Obstacle("unlisted", found)
        return Obstacle("revoked", "the key of this device was revoked") if listed.entry.revoked else None


class Guard:
    """Demands with their ledgers open; `open_guard` makes it.

    Args:
        demands: Demands on updates.
        max_staleness: Most rounds by which an update may be late.
        ledger: Ledger of the updates that were accepted; None without a list.
        noise: Gate of updates with noise of their own; None for none.
        mechanism: Noise on the mean; None for none.
        budget: Budget that pays for that noise.
    """

    def __init__(
        self,
        demands: Demands = NOTHING,
        *,
        max_staleness: int = 0,
        ledger: Ledger | None = None,
        noise: Gate | None = None,
        mechanism: Gaussian | None = None,
        budget: PrivacyLedger | None = None,
    ) -> None:
        self._demands, self._max_staleness, self._ledger, self._noise = demands, max_staleness, ledger, noise
        self._mechanism, self.budget = mechanism, budget
        self._read_at: tuple[int, ...] = ()

    def for_round(self) -> RoundGuard:
        """The judge of a round, by the list of clients as it is now.

        Raises:
            InputError: The list of clients is damaged.
        """
        self._read_at = self._state_of_list()
        clients, gates = self._read_clients(), list[Gate]()
        if clients is not None and self._ledger is not None:
            from fedpara_edge.trust.signatures import SignatureGate

            gates.append(SignatureGate(clients, self._ledger, max_staleness=self._max_staleness))
        if self._noise is not None:
            gates.append(self._noise)
        return RoundGuard(Gates(gates) if gates else None, clients)

    @property
    def is_outdated(self) -> bool:
        """Whether the list of clients was changed since a judge was asked for."""
        return self._state_of_list() != self._read_at

    def check_budget(self, number: int) -> None:
        """Refuse a round that could not be paid for.

        Args:
            number: Round of the weights that it leads to.

        Raises:
            BudgetError: It could not.
        """
        if self._mechanism is not None and self.budget is not None:
            self.budget.check(self._mechanism, number)

    @property
    def spent(self) -> Mapping[str, Any] | None:
        """The noise with its budget and what is spent of it, plain data; None without."""
        if self._mechanism is None or self.budget is None:
            return None
        return {**self._mechanism.to_json(), "spent": self.budget.spent(self._mechanism.delta)}

    def _state_of_list(self) -> tuple[int, ...]:
        """What differs once the file was written again, or replaced."""
        if self._demands.allow is None:
            return ()
        try:
            found = self._demands.allow.stat()
        except OSError as error:
            return (-(error.errno or 1),)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _read_clients(self) -> Clients | None:
        if self._demands.allow is None:
            return None
        from fedpara_edge.trust.clients import read_clients

        return read_clients(self._demands.allow)


@contextmanager
def open_guard(folder: Path, demands: Demands, aggregate: AggregateConfig) -> Iterator[Guard]:
    """Open the ledgers of a server for as long as the context lasts.

    Args:
        folder: State folder.
        demands: Demands on updates.
        aggregate: Aggregation of them.

    Raises:
        InputError: An option does not fit, or a ledger or the list of clients is damaged.
    """
    with ExitStack() as opened:
        ledger = noise = budget = None
        if demands.allow is not None:
            from fedpara_edge.trust.clients import read_clients
            from fedpara_edge.trust.ledger import open_ledger

            ledger = opened.enter_context(open_ledger(folder / "ledger", read_clients(demands.allow).run))
        if demands.device_privacy is not None:
            from fedpara_edge.aggregation.noised import NoiseGate
            from fedpara_edge.privacy.devices import find_device_budget, open_device_ledger

            of_device = find_device_budget(demands.device_privacy)
            noise = NoiseGate(of_device, opened.enter_context(open_device_ledger(folder / "privacy")))
        if aggregate.privacy is not None:
            from fedpara_edge.privacy.accounting import epsilon
            from fedpara_edge.privacy.ledger import open_privacy_ledger

            budget = opened.enter_context(open_privacy_ledger(folder / "privacy", epsilon))
        yield Guard(
            demands,
            max_staleness=aggregate.max_staleness,
            ledger=ledger,
            noise=noise,
            mechanism=aggregate.mechanism,
            budget=budget,
        )
