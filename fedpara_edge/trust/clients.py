"""The list of clients whose updates count: a TOML file with a public key for each.

    run = "winter"                    name of the run that updates are signed for

    [clients.device-1]
    key = "ed25519:…"                 public key, as `keys show` prints it
    max_examples = 5000               most examples that the client may claim; none for any number
    revoked = true                    whether nothing is accepted from the client any more

A round reads it once, at its start: what is changed in it takes effect at the next round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key

from fedpara_edge.errors import InputError, brief
from fedpara_edge.options import check, check_keys, declared, option
from fedpara_edge.storage.tomlfile import read_toml
from fedpara_edge.trust.keys import parse_public


@dataclass(frozen=True, kw_only=True)
class Client:
    """An entry of the list; the module describes the fields."""

    key: str = option(help="Public key, as `keys show` prints it.")
    max_examples: int | None = option(None, minimum=1, help="Most examples that the client may claim.")
    revoked: bool = option(False, help="Whether nothing is accepted from the client any more.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A client and its key.

    Args:
        name: Name of the client.
        key: Public key.
        client: Entry in the list.
    """

    name: str
    key: Key
    client: Client


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The clients of a run.

    Args:
        run: Name of the run.
        by_key: Client by the identifier of its key.
    """

    run: str
    by_key: Mapping[str, Member]


def read_clients(path: Path) -> Clients:
    """Read a list of clients.

    Raises:
        InputError: The file can't be read, an entry does not fit, or two clients have one key.
    """
    try:
        data = read_toml(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a TOML file with a list of clients, found {error}") from error
    try:
        return _parsed(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _parsed(data: Mapping[str, Any]) -> Clients:
    check_keys(data, ("run", "clients"))
    run, entries = data.get("run"), data.get("clients")
    if not isinstance(run, str) or not run:
        raise InputError(f"expected a name, found {brief(run)}", key="run")
    if not isinstance(entries, dict):
        raise InputError(f"expected a table for each client, found {brief(entries)}", key="clients")
    by_key: dict[str, Member] = {}
    for name, entry in entries.items():
        try:
            member = _member(name, entry)
        except InputError as error:
            raise error.under(f"clients.{name}") from error
        if (other := by_key.setdefault(member.key.keyid, member)) is not member:
            raise InputError(f"expected a key of its own, found that of {other.name}", key=f"clients.{name}.key")
    return Clients(run=run, by_key=by_key)


def _member(name: str, entry: Any) -> Member:
    if not isinstance(entry, dict):
        raise InputError(f"expected a table, found {brief(entry)}")
    check_keys(entry, declared(Client))
    if "key" not in entry:
        raise InputError("expected a public key, found none", key="key")
    client = Client(**entry)
    try:
        return Member(name=name, key=parse_public(client.key), client=client)
    except InputError as error:
        raise error.about("key") from error
