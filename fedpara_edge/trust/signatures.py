"""Signed updates: what is proven of a file, and the gate of a server that takes no others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fedpara_edge.errors import TrustError, brief, brief_text
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.trust.clients import Clients, Member
from fedpara_edge.trust.envelope import HEADER_FIELDS, Statement, read_envelope, verified_statement
from fedpara_edge.trust.ledger import Ledger


class IdentityGate:
    """A `fedpara_edge.aggregation.gate.Gate` that only updates pass which a client of a list signed for its run.

    Args:
        clients: Clients whose updates count.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def check(self, file: TensorFile, weights: Weights) -> None:
        """Refuse an update that is not proven to be that of the client whose name it has."""
        member, statement = self._identify(file.path)
        self._admit(file.path, member, statement, weights)
        self._check_content(file, statement)

    def check_partial(self, path: Path) -> None:
        """Refuse any partial."""
        raise TrustError(
            f"{path}: expected signed updates with a list of clients, found a partial, which nobody signs; give the "
            "list where partials are made",
            code="unsigned",
        )

    def record(self, paths: Sequence[Path], weights: Weights) -> None:
        """Nothing to remember."""

    def _identify(self, path: Path) -> tuple[Member, Statement]:
        """The client that signed an update in its own name, and what it states."""
        envelope = read_envelope(path)
        members = [self._clients.by_key[keyid] for keyid in envelope.signatures if keyid in self._clients.by_key]
        if len(members) != 1:
            raise TrustError(
                f"{path}: expected a signature by one key of the list of clients, found {len(members)} of "
                f"{len(envelope.signatures)}; add the client's key to the list, or leave the file out",
                code="unknown_client",
            )
        (member,) = members
        statement = verified_statement(envelope, member.key, path)
        if statement.client != member.name:
            found = f"expected its own name to be signed with its key, found {brief(statement.client)}"
            raise _refusal(path, member.name, found, "forged")
        if statement.run != self._clients.run:
            found = f"expected an update of run {self._clients.run!r}, found one of {brief(statement.run)}"
            raise _refusal(path, member.name, found, "replay")
        return member, statement

    def _admit(self, path: Path, member: Member, statement: Statement, weights: Weights) -> None:
        """Refuse what a client may not send, though it is its own; here, nothing."""

    def _check_content(self, file: TensorFile, statement: Statement) -> None:
        for name in HEADER_FIELDS:
            if file.header.get(name) != getattr(statement, name):
                found = f"{name}: expected {brief(getattr(statement, name))} as signed, found another"
                raise _refusal(file.path, statement.client, found, "forged")
        if file.sha256() != statement.sha256:
            raise _refusal(file.path, statement.client, "expected the content that was signed, found other", "forged")


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
        self._statements: dict[Path, Statement] = {}

    def record(self, paths: Sequence[Path], weights: Weights) -> None:
        """Enter the updates that are accepted in a round in the ledger."""
        accepted = [self._statements[path] for path in paths]
        for number in sorted({weights.round, *(statement.round for statement in accepted)}):
            own = [statement for statement in accepted if statement.round == number]
            base = own[0].base if own else weights.base
            digests = {statement.client: statement.sha256 for statement in own}
            self._ledger.record(digests, fingerprint=weights.fingerprint, round=number, base=base)

    def _admit(self, path: Path, member: Member, statement: Statement, weights: Weights) -> None:
        if member.client.revoked:
            raise _refusal(path, member.name, "expected a key that is not revoked, found a revoked one", "revoked")
        if member.client.max_examples is not None and statement.examples > member.client.max_examples:
            found = f"expected at most {member.client.max_examples} examples, found {statement.examples} claimed"
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
        self._statements[path] = statement


def _refusal(path: Path, client: str, found: str, code: str) -> TrustError:
    return TrustError(f"{path}: client {client!r}: {found}; leave it out", code=code)
