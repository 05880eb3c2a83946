"""The folder of a round: who was asked, whose updates were taken or refused, and whether it is closed.

    opened.json      {"opened": seconds since 1970}
    asked.jsonl      a line for each device that was asked to train: its name, as JSON
    updates/<sender>-<sha256>.safetensors
                     updates that were taken, and with .dsse after that the envelopes of signed ones. <sender> stands
                     for client and round of the update, so that there is one of each, and <sha256> is that of the
                     file, so that one that is sent again is known
    refused.jsonl    a line for each update that was refused (`Refusal`)
    sent.jsonl       a line for each file that devices got: how many bytes of it were sent
    closed.json      {"closed": seconds since 1970, "updates": [names of files]}: the round takes no more updates, and
                     these are aggregated; absent while it is open
    result.json      what came of it: `Round.to_json`, the times, what was refused, and the stragglers; written last of
                     all

An update is taken by the rename of its file, which is on the disk by then. So however the server ends, each is there
once or was never taken, and the next start goes on with the same ones. Refusals and sent bytes outlive the process, but
not a power cut.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.errors import InputError, brief
from fedpara_edge.storage.atomic import replacing_file, sync
from fedpara_edge.storage.lines import append_lines, read_lines
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{64})\.safetensors")
_MOST_REFUSALS = 10_000
"""Refusals of a round that are remembered."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An update that was refused when it came.

    Args:
        client: Device that sent it.
        code: Reason in one word (`fedpara_edge.errors`).
        message: Reason in one line.
        bytes: Size of the update.
    """

    client: str
    code: str
    message: str
    bytes: int


class RoundFolder:
    """The folder of a round, made if it is missing.

    Args:
        path: The folder.

    Attributes:
        asked: Names of the devices that were asked to train.
        refused: Updates that were refused, in order.
        sent_bytes: Number of bytes of files that were sent to devices.
        opened: Time at which it was opened, in seconds since 1970; None if it was not yet.
        closed: Updates to aggregate; None while it is open.

    Raises:
        InputError: A file in it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.updates.mkdir(parents=True, exist_ok=True)
        found = [match for entry in self.updates.iterdir() if (match := _NAME.fullmatch(entry.name))]
        self._taken = {match[1]: match[2] for match in found}
        self.asked = set(map(str, read_lines(self.path / "asked.jsonl", remedy="delete it")))
        self.refused = self._read_refused()
        sent = read_lines(self.path / "sent.jsonl", remedy="delete it")
        self.sent_bytes = sum(bytes for bytes in sent if type(bytes) is int)
        opened, closed = _read(path / "opened.json", opened=_is_time), _read(path / "closed.json", updates=_are_names)
        self.opened = None if opened is None else float(opened["opened"])
        self.closed = None if closed is None else [self.updates / name for name in closed["updates"]]

    @property
    def updates(self) -> Path:
        """Folder of the updates."""
        return self.path / "updates"

    @property
    def count(self) -> int:
        """Number of updates that were taken."""
        return len(self._taken)

    @property
    def result(self) -> Mapping[str, Any] | None:
        """What came of it; None before."""
        return read_result(self.path)

    @property
    def digests(self) -> set[str]:
        """SHA-256 of the updates that were taken."""
        return set(self._taken.values())

    def has_sent(self, client: str, round: int) -> bool:
        """Whether an update of a client from the weights of a round was taken."""
        return _sender(client, round) in self._taken

    def digest_of(self, client: str, round: int) -> str | None:
        """SHA-256 of that update; None if there is none."""
        return self._taken.get(_sender(client, round))

    def open(self, now: float, asked: Collection[str] = ()) -> None:
        """Open the round, with devices to be asked first."""
        self.ask(asked)
        self._write("opened.json", {"opened": now})
        self.opened = now

    def ask(self, clients: Collection[str]) -> None:
        """Remember that devices are asked to train."""
        if not clients:
            return
        append_lines(self.path / "asked.jsonl", clients)
        self.asked.update(clients)

    def refuse(self, refusal: Refusal) -> None:
        """Remember an update that was refused."""
        if len(self.refused) < _MOST_REFUSALS:
            append_lines(self.path / "refused.jsonl", [asdict(refusal)], durable=False)
            self.refused.append(refusal)

    def note_sent(self, bytes: int) -> None:
        """Remember how much of a file was sent to a device."""
        if bytes:
            append_lines(self.path / "sent.jsonl", [bytes], durable=False)
            self.sent_bytes += bytes

    def take(self, update: Path, client: str, round: int, digest: str) -> None:
        """Take an update, whose content is on the disk."""
        sender = _sender(client, round)
        taken = self.updates / f"{sender}-{digest}.safetensors"
        if (envelope := envelope_of(update)).exists():
            sync(envelope)
            envelope.rename(envelope_of(taken))
        update.rename(taken)
        sync(self.updates)
        self._taken[sender] = digest

    def close(self, now: float) -> None:
        """Close the round with the updates that were taken."""
        names = [f"{sender}-{digest}.safetensors" for sender, digest in sorted(self._taken.items())]
        self._write("closed.json", {"closed": now, "updates": names})
        self.closed = [self.updates / name for name in names]

    def reopen(self) -> None:
        """Take updates again."""
        (self.path / "closed.json").unlink(missing_ok=True)
        sync(self.path)
        self.closed = None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write what came of the round."""
        self._write("result.json", result)

    def forget(self) -> None:
        """Remove the updates; what came of them stays."""
        shutil.rmtree(self.updates, ignore_errors=True)

    def _read_refused(self) -> list[Refusal]:
        path = self.path / "refused.jsonl"
        try:
            found = [Refusal(**each) for each in read_lines(path, remedy="delete it")]
            if not all(isinstance(each.client, str) and type(each.bytes) is int for each in found):
                raise TypeError("other fields")
        except TypeError as error:
            raise InputError(f"{path}: expected updates that were refused, found {error}; delete it") from error
        return found

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing_file(self.path / name) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def envelope_of(update: Path) -> Path:
    """File of the signature of an update (`fedpara_edge.trust.envelope`)."""
    return update.with_name(f"{update.name}.dsse")


def read_result(path: Path) -> Mapping[str, Any] | None:
    """What came of a round, from its folder; None where that is not known.

    Raises:
        InputError: The file is damaged.
    """
    return _read(path / "result.json")


def _read(path: Path, **fitting: Callable[[Any], bool]) -> dict[str, Any] | None:
    """A record, some of whose fields have to fit; None if there is none."""
    if not path.exists():
        return None
    try:
        content = strict_json(read_text(path))
        if not isinstance(content, dict):
            raise ValueError("no object")
        for field, fits in fitting.items():
            if not fits(content.get(field)):
                raise ValueError(f"{field} {brief(content.get(field))}")
        return content
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a record of the round, found {error}; restore it from a copy") from error


def _is_time(found: Any) -> bool:
    return type(found) in (int, float) and 0 <= found < 1 << 40


def _are_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in found)


def _sender(client: str, round: int) -> str:
    return hashlib.sha256(f"{round} {client}".encode()).hexdigest()[:32]
