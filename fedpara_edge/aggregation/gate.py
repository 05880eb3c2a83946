"""Whose an update is: what a server may ask of each file before it counts as that of a client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from fedpara_edge.formats.partial import PartialFile
    from fedpara_edge.formats.weights import Weights
    from fedpara_edge.storage.tensorfile import TensorFile


class Identity(NamedTuple):
    """An update: its client, its round, and the SHA-256 of its file."""

    client: str
    round: int
    sha256: str


class Gate(Protocol):
    """A judge of whose an update is, and a memory of those that were accepted."""

    def check(self, file: TensorFile, weights: Weights) -> None:
        """Refuse an update that is not proven to be that of the client whose name it has.

        What only its values tell, the file refuses when these were read (`TensorFile.check_read`).

        Args:
            file: Open file of the update, of which the header alone was read.
            weights: Weights of the round.

        Raises:
            TrustError: It is forged, unsigned or replayed, or too much is claimed in it.
            InvalidUpdateError: It does not state what it must.
            BudgetError: Nothing is left of the privacy budget of its client.
        """
        ...

    def check_partial(self, partial: PartialFile, weights: Weights) -> None:
        """Refuse a partial, if it hides whose the updates in it are, or has one that would be refused itself.

        Raises:
            TrustError, InvalidUpdateError: It does.
        """
        ...

    def record(self, accepted: Sequence[Identity], weights: Weights) -> None:
        """Remember the updates that are accepted in a round, before anything is written that they went into."""
        ...


class HashingGate:
    """A `Gate` that everything passes, and whose digest is then known for a transcript."""

    def check(self, file: TensorFile, weights: Weights) -> None:  # noqa: ARG002
        """Have the digest be found while the file is read."""
        file.digest_while_read()

    def check_partial(self, partial: PartialFile, weights: Weights) -> None:
        """Nothing to compute: a partial has the digests."""

    def record(self, accepted: Sequence[Identity], weights: Weights) -> None:
        """Nothing to remember."""


class Gates:
    """A `Gate` of several, all of which an update must pass.

    Args:
        gates: Gates, in the order in which they are passed.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = gates

    def check(self, file: TensorFile, weights: Weights) -> None:
        """Refuse an update that one of them refuses."""
        for gate in self._gates:
            gate.check(file, weights)

    def check_partial(self, partial: PartialFile, weights: Weights) -> None:
        """Refuse a partial that one of them refuses."""
        for gate in self._gates:
            gate.check_partial(partial, weights)

    def record(self, accepted: Sequence[Identity], weights: Weights) -> None:
        """Have all remember the updates that are accepted."""
        for gate in self._gates:
            gate.record(accepted, weights)
