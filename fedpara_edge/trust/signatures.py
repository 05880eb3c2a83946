"""Signed updates: what is proven of a file, and the gate of a server that takes no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from fedpara_edge.aggregation.gate import Identity
from fedpara_edge.errors import TrustError, brief, brief_text, counted
from fedpara_edge.formats.partial import PartialFile
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.trust.clients import Client, Clients, Entry, Member
from fedpara_edge.trust.envelope import (
    HEADER_FIELDS,
    PartialStatement,
    Stated,
    Statement,
    read_envelope,
    verified_statement,
)
from fedpara_edge.trust.ledger import Ledger


class IdentityGate:
    """A `fedpara_edge.aggregation.gate.Gate` that only updates pass which a client of a list signed for its run.

    Partials pass that an aggregator of the list signed, if all updates in them are of such clients.

    Args:
        clients: Clients whose updates count.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._by_key = {member.key.keyid: member for member in clients.members}
        self._aggregators = {member.key.keyid: member for member in clients.aggregators}

    def check(self, file: TensorFile, weights: Weights) -> None:
        """Refuse an update that is not proven to be its client's; for its content, the file does once it is read."""
        member, statement = self._proven(file.path, self._by_key, Statement, "clients")
        if statement.client != member.name:
            found = f"expected its own name to be signed with its key, found {brief(statement.client)}"
            raise _refusal(file.path, member.name, found, "forged")
        self._admit(file.path, member, statement, weights)
        for name in HEADER_FIELDS:
            if file.header.get(name) != getattr(statement, name):
                found = f"{name}: expected {brief(getattr(statement, name))} as signed, found another"
                raise _refusal(file.path, statement.client, found, "forged")
        file.digest_while_read(partial(_refusal_of_content, file.path, statement))

    def check_partial(self, partial: PartialFile, weights: Weights) -> None:
        """Refuse a partial that no aggregator signed, or that has an update which would be refused itself."""
        path = partial.path
        member, statement = self._proven(path, self._aggregators, PartialStatement, "aggregators")
        if member.entry.revoked:
            raise TrustError(
                f"{path}: aggregator {member.name!r}: expected a key that is not revoked, found a revoked one; leave "
                "it out",
                code="revoked",
            )
        about = (partial.digest, weights.fingerprint, weights.round, weights.base)
        if about != (statement.digest, statement.fingerprint, statement.round, statement.base):
            raise TrustError(
                f"{path}: aggregator {member.name!r}: expected the content that was signed, found other; leave it out",
                code="forged",
            )
        for each in partial.counted:
            client = each.header.client
            if client not in self._clients.by_name:
                found = "expected a client of the list in a partial, found another"
                raise _refusal(path, client, found, "unknown_client")
            header = {name: getattr(each.header, name) for name in HEADER_FIELDS}
            stated = Statement(sha256=each.sha256, run=statement.run, **header)
            self._admit(path, self._clients.by_name[client], stated, weights)

    def record(self, accepted: Sequence[Identity], weights: Weights) -> None:
        """Nothing to remember."""

    def _proven(
        self, path: Path, listed: Mapping[str, Member[Entry]], kind: type[Stated], table: str
    ) -> tuple[Member[Entry], Stated]:
        """Who of the list signed a file for the run, and what is stated of it."""
        envelope = read_envelope(path)
        members = [listed[keyid] for keyid in envelope.signatures if keyid in listed]
        if len(members) != 1:
            raise TrustError(
                f"{path}: expected a signature by one key of the list of {table}, found {len(members)} of "
                f"{len(envelope.signatures)}; add the key to the list, or leave the file out",
                code="unknown_client",
            )
        (member,) = members
        statement = verified_statement(envelope, member.key, path, kind)
        if statement.run != self._clients.run:
            found = f"expected {kind.kind} of run {self._clients.run!r}, found one of {brief(statement.run)}"
            raise _refusal(path, member.name, found, "replay")
        return member, statement

    def _admit(self, path: Path, member: Member[Client], statement: Statement, weights: Weights) -> None:
        """Refuse what a client may not send, though it is its own; here, nothing."""


class SignatureGate(IdentityGate):
    """The gate of a server: clients that are not revoked pass, up to their cap, and each once a round.

    Args:
        clients: Clients whose updates count.
        ledger: Open ledger of their run.
        max_staleness: Most rounds by which an update may be late. That it has not counted in an earlier round is known
            to the server state, so that a round can be done again.
    """

    def __init__(self, clients: Clients, ledger: Ledger, *, max_staleness: int = 0) -> None:
        super().__init__(clients)
        self._max_staleness = max_staleness
        self._ledger, self._oldest_open = ledger, ledger.oldest_open
        self._accepted = cache(ledger.accepted)
        self._bases: dict[Identity, str] = {}

    def record(self, accepted: Sequence[Identity], weights: Weights) -> None:
        """Enter the updates that are accepted in a round in the ledger."""
        for number in sorted({weights.round, *(each.round for each in accepted)}):
            own = [each for each in accepted if each.round == number]
            base = self._bases[own[0]] if own else weights.base
            digests = {each.client: each.sha256 for each in own}
            self._ledger.record(digests, fingerprint=weights.fingerprint, round=number, base=base)

    def _admit(self, path: Path, member: Member[Client], statement: Statement, weights: Weights) -> None:
        if member.entry.revoked:
            raise _refusal(path, member.name, "expected a key that is not revoked, found a revoked one", "revoked")
        if member.entry.max_examples is not None and statement.examples > member.entry.max_examples:
            found = (
                f"expected at most {counted(member.entry.max_examples, 'example')}, found {statement.examples} claimed"
            )
            raise _refusal(path, member.name, found, "over_cap")
        if statement.round < self._oldest_open:
            found = f"expected an update of round {self._oldest_open} or later, found one of round {statement.round}"
            raise _refusal(path, member.name, f"{found}, which is closed", "replay")
        is_timely = weights.round - self._max_staleness <= statement.round <= weights.round
        known = self._accepted(statement.round).get(member.name)
        if known is not None and (known != statement.sha256 or not is_timely):
            of_round = f"its one update of round {statement.round}, {brief_text(known, max_length=12)}, was accepted"
            sent = brief_text(statement.sha256, max_length=12)
            found = f"expected an update that was not replayed, found {sent}: {of_round}"
            raise _refusal(path, member.name, found, "replay")
        self._bases[Identity(statement.client, statement.round, statement.sha256)] = statement.base


def _refusal_of_content(path: Path, statement: Statement, sha256: str) -> TrustError | None:
    """The refusal of a file with a digest, beside what its client stated of it; None if it has that."""
    if sha256 == statement.sha256:
        return None
    return _refusal(path, statement.client, "expected the content that was signed, found other", "forged")


def _refusal(path: Path, client: str, found: str, code: str) -> TrustError:
    return TrustError(f"{path}: client {client!r}: {found}; leave it out", code=code)
