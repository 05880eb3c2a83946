"""The list of clients whose updates count, and of aggregators whose partials do: a TOML file with a key for each.

    run = "winter"                    name of the run that updates are signed for

    [clients.device-1]
    key = "ed25519:…"                 public key, as `keys show` prints it
    max_examples = 5000               most examples that the client may claim; none for any number
    revoked = true                    whether nothing is accepted from the client any more

    [aggregators.east]                who may sum updates of these clients in partials
    key = "ed25519:…"
    revoked = true

`aggregate` reads it once, at the start of a round: what is changed in it takes effect at the next one. A server that
stays (`fedpara_edge.serving.guarding`) reads it again when it was changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

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
class Aggregator:
    """An entry of an aggregator; the module describes the fields."""

    key: str = option(help="Public key, as `keys show` prints it.")
    revoked: bool = option(False, help="Whether nothing is accepted from the aggregator any more.")

    def __post_init__(self) -> None:
        check(self)


Entry = TypeVar("Entry", Client, Aggregator)


@dataclass(frozen=True, kw_only=True)
class Member(Generic[Entry]):
    """A client or an aggregator, and its key.

    Args:
        name: Name.
        key: Public key.
        entry: Entry in the list.
    """

    name: str
    key: Key
    entry: Entry


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The clients of a run, and its aggregators.

    Args:
        run: Name of the run.
        members: The clients.
        aggregators: The aggregators.
    """

    run: str
    members: Sequence[Member[Client]]
    aggregators: Sequence[Member[Aggregator]] = ()

    @cached_property
    def by_name(self) -> Mapping[str, Member[Client]]:
        """Clients by name."""
        return {member.name: member for member in self.members}


def read_clients(path: Path) -> Clients:
    """Read a list of clients.

    Raises:
        InputError: The file can't be read, an entry does not fit, or two clients have one key.
    """
    try:
        data = read_toml(path)
    except OSError as error:
        raise InputError(f"{path}: expected a TOML file, found {error.strerror}; check the path") from error
    except ValueError as error:
        raise InputError(f"{path}: expected a TOML file with a list of clients, found {error}") from error
    try:
        return _parsed(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _parsed(data: Mapping[str, Any]) -> Clients:
    check_keys(data, ("run", "clients", "aggregators"))
    run = data.get("run")
    if not isinstance(run, str) or not run:
        raise InputError(f"expected a name, found {brief(run)}", key="run")
    members = _members("clients", data.get("clients"), Client)
    aggregators = _members("aggregators", data.get("aggregators", {}), Aggregator)
    places: dict[str, str] = {}
    for place, key in [
        *((f"clients.{member.name}", member.key) for member in members),
        *((f"aggregators.{member.name}", member.key) for member in aggregators),
    ]:
        if (other := places.setdefault(key.keyid, place)) != place:
            raise InputError(f"expected a key of its own, found that of {other}", key=f"{place}.key")
    return Clients(run=run, members=members, aggregators=aggregators)


def _members(table: str, entries: Any, kind: type[Entry]) -> list[Member[Entry]]:
    if not isinstance(entries, dict):
        raise InputError(f"expected a table for each of them, found {brief(entries)}", key=table)
    found = []
    for name, entry in entries.items():
        try:
            found.append(_member(name, entry, kind))
        except InputError as error:
            raise error.under(f"{table}.{name}") from error
    return found


def _member(name: str, entry: Any, kind: type[Entry]) -> Member[Entry]:
    if not isinstance(entry, dict):
        raise InputError(f"expected a table, found {brief(entry)}")
    check_keys(entry, declared(kind))
    if "key" not in entry:
        raise InputError("expected a public key, found none", key="key")
    made = kind(**entry)
    try:
        return Member(name=name, key=parse_public(made.key), entry=made)
    except InputError as error:
        raise error.about("key") from error
