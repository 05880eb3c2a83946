"""The gate of a server that takes updates with noise of their device's own alone, as long as its budget lasts."""

from __future__ import annotations

from collections.abc import Sequence

from fedpara_edge.aggregation.gate import Identity
from fedpara_edge.errors import BudgetError, InputError, InvalidUpdateError
from fedpara_edge.formats.partial import PartialFile
from fedpara_edge.formats.weights import Weights
from fedpara_edge.privacy.devices import DeviceBudget, DeviceLedger, Sent
from fedpara_edge.privacy.local import stated
from fedpara_edge.storage.tensorfile import TensorFile


class NoiseGate:
    """A `fedpara_edge.aggregation.gate.Gate` that keeps account of the noise that updates state.

    Without signatures, it is whoever uses a client's name that spends its budget.

    Args:
        budget: Budget of each device.
        ledger: Open ledger of what the devices spent.
    """

    def __init__(self, budget: DeviceBudget, ledger: DeviceLedger) -> None:
        self._budget, self._ledger = budget, ledger
        self._sent: dict[tuple[str, str], Sent] = {}

    def check(self, file: TensorFile, weights: Weights) -> None:
        """Refuse an update that states no noise, or whose client has nothing left."""
        client, found = file.header.get("client"), file.header.get("privacy")
        if not isinstance(client, str):
            return  # refused for that
        if found is None:
            raise InvalidUpdateError(
                f"{file.path}: client {client!r}: expected noise that its device added, found none; train with "
                "--privacy",
                code="no_noise",
            )
        try:
            noise = stated(found).noise
        except InputError as error:
            raise InvalidUpdateError(f"{file.path}: {error}", code="header") from error
        sent = Sent(client=client, sha256=file.sha256(), noise=noise)
        try:
            self._ledger.check(self._budget, sent, weights.base)
        except BudgetError as error:
            raise BudgetError(f"{file.path}: {error}") from error
        self._sent[client, sent.sha256] = sent

    def check_partial(self, partial: PartialFile, weights: Weights) -> None:  # noqa: ARG002
        """Refuse any partial."""
        raise InvalidUpdateError(
            f"{partial.path}: expected updates that state their noise with a budget of devices, found a "
            "partial, which states none; give the budget where partials are made",
            code="no_noise",
        )

    def record(self, accepted: Sequence[Identity], weights: Weights) -> None:
        """Enter the updates that are accepted in a round in the ledger."""
        self._ledger.record(self._budget, [self._sent[each.client, each.sha256] for each in accepted], weights.base)
