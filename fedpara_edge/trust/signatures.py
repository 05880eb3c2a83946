"""The gate of a server that takes signed updates only: by key, statement and ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpara_edge.errors import TrustError, brief
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.atomic import sha256_of
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.trust.clients import Clients, Member
from fedpara_edge.trust.envelope import HEADER_FIELDS, Statement, read_envelope, verified_statement
from fedpara_edge.trust.ledger import Ledger


class SignatureGate:
    """A `fedpara_edge.aggregation.gate.Gate` that only the clients of a list pass, each once a round.

    Args:
        clients: Clients whose updates count.
        ledger: Open ledger of their run.
    """

    def __init__(self, clients: Clients, ledger: Ledger) -> None:
        self._clients, self._ledger = clients, ledger
        self._statements: dict[Path, Statement] = {}

    def check(self, file: TensorFile, weights: Weights) -> None:
        """Refuse an update that is not proven to be that of the client whose name it has."""
        path = file.path
        envelope = read_envelope(path)
        members = [self._clients.by_key[keyid] for keyid in envelope.signatures if keyid in self._clients.by_key]
        if len(members) != 1:
            raise TrustError(
                f"{path}: expected a signature by one key of the list of clients, found {len(members)} of "
                f"{len(envelope.signatures)}; add the client's key to the list, or leave the file out",
                code="unknown_client",
            )
        statement = verified_statement(envelope, members[0].key, path)
        self._check_member(path, members[0], statement)
        self._check_file(file, statement)
        self._check_once(path, statement, weights)
        self._statements[path] = statement

    def record(self, paths: Sequence[Path], weights: Weights) -> None:
        """Enter the updates that are accepted in a round in the ledger."""
        accepted = [self._statements[path] for path in paths]
        self._ledger.record(weights, {statement.client: statement.sha256 for statement in accepted})

    def _check_member(self, path: Path, member: Member, statement: Statement) -> None:
        if member.client.revoked:
            raise _refusal(path, member.name, "expected a key that is not revoked, found a revoked one", "revoked")
        if statement.client != member.name:
            found = f"expected its own name to be signed with its key, found {brief(statement.client)}"
            raise _refusal(path, member.name, found, "forged")
        if statement.run != self._clients.run:
            found = f"expected an update of run {self._clients.run!r}, found one of {brief(statement.run)}"
            raise _refusal(path, member.name, found, "replay")
        if member.client.max_examples is not None and statement.examples > member.client.max_examples:
            found = f"expected at most {member.client.max_examples} examples, found {statement.examples} claimed"
            raise _refusal(path, member.name, found, "over_cap")

    def _check_file(self, file: TensorFile, statement: Statement) -> None:
        for name in HEADER_FIELDS:
            if file.header.get(name) != getattr(statement, name):
                found = f"{name}: expected {brief(getattr(statement, name))} as signed, found another"
                raise _refusal(file.path, statement.client, found, "forged")
        if sha256_of(file.path) != statement.sha256:
            raise _refusal(file.path, statement.client, "expected the content that was signed, found other", "forged")

    def _check_once(self, path: Path, statement: Statement, weights: Weights) -> None:
        known = self._ledger.accepted(statement.round).get(statement.client)
        if known is None or (known == statement.sha256 and statement.round == weights.round):
            return
        of_round = f"its one update of round {statement.round}, {known[:12]}…, was accepted"
        found = f"expected an update that was not replayed, found {statement.sha256[:12]}…: {of_round}"
        raise _refusal(path, statement.client, found, "replay")


def _refusal(path: Path, client: str, found: str, code: str) -> TrustError:
    return TrustError(f"{path}: client {client!r}: {found}; leave it out", code=code)
