"""The ledger of a privacy budget: the noise of every release, written before it is released.

    privacy.json    {"format": "fedpara-edge/privacy", "version": 1, "secret": 64 hexadecimal digits,
                     "spent": [{"round", "noise", "sampling", "tag"}, …]}

readable by its owner alone. The tag is HMAC-SHA-256, with the secret, of the weights before, of the mechanism and of
the sum that the noise is for, and the key of the noise is made from it: a round that is done again after a kill has the
same tag, hence the same noise, and costs nothing more; any other sum has another noise and is an entry of its own. So
no weights are released that the ledger does not have, and no two with the same noise.

The ledger of a server is for all that the same clients take part in, whatever bundle or run; that of a device, in its
state folder, is for its own updates. It is the secret of whoever adds the noise: whoever has it can take the noise off
again.
"""

from __future__ import annotations

import hmac
import json
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.errors import BudgetError, InputError, OutputExistsError, counted
from fedpara_edge.privacy.budget import Mechanism
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.locking import hold_folder
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

FORMAT = "fedpara-edge/privacy"
FILE = "privacy.json"
Epsilon = Callable[[Sequence[tuple[float, float]], float], float]
"""`accounting.epsilon`."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A round that was paid for; the module describes the fields."""

    round: int
    noise: float
    sampling: float
    tag: str


class PrivacyLedger:
    """A ledger that this process alone may write; `open_privacy_ledger` makes it.

    Args:
        path: File of the ledger.
        epsilon: Function from rounds and a δ to their ε.
    """

    def __init__(self, path: Path, epsilon: Epsilon) -> None:
        self._path, self._epsilon = path, epsilon
        self._secret, self._entries = _read(path) if path.exists() else (secrets.token_bytes(32), ())
        self._known: dict[tuple[int, float], float] = {}

    def spent(self, delta: float) -> float:
        """The ε of all rounds so far at a δ."""
        return self._of(self._entries, delta)

    def check(self, mechanism: Mechanism, round: int) -> None:
        """Refuse a release that can't be paid for, before any work; not one of a round in which there was one already.

        Raises:
            BudgetError: The budget would be exceeded.
        """
        if round not in {entry.round for entry in self._entries}:
            new = Entry(round=round, noise=mechanism.noise, sampling=mechanism.sampling, tag="")
            self._check(mechanism, (*self._entries, new))

    def spend(self, mechanism: Mechanism, content: bytes, round: int, *, again: bool = False) -> bytes:
        """Pay for a release, and return the secret key of its noise.

        Args:
            mechanism: Mechanism with its budget.
            content: Digest of all that decides what is released but for the noise.
            round: Round of the weights that it leads to.
            again: Whether there are files of the round, so that it must have been paid for.

        Raises:
            OutputExistsError: The files are those of other updates.
            BudgetError: With it, the budget would be exceeded.
            FedparaError: The disk refuses the write.
        """
        tag = hmac.digest(self._secret, content, "sha256")
        if tag.hex() not in {entry.tag for entry in self._entries}:
            if again:
                raise OutputExistsError(
                    f"{self._path}: expected the updates of which there are files of round {round}, found others, "
                    "which would be paid for once more; choose other names or pass --overwrite"
                )
            entry = Entry(round=round, noise=mechanism.noise, sampling=mechanism.sampling, tag=tag.hex())
            entries = (*self._entries, entry)
            self._check(mechanism, entries)
            self._write(entries)
            self._entries = entries
        return hmac.digest(self._secret, b"noise" + tag, "sha256")

    def _check(self, mechanism: Mechanism, entries: Sequence[Entry]) -> None:
        needed = self._of(entries, mechanism.delta)
        if needed > mechanism.epsilon:
            raise BudgetError(
                f"{self._path}: expected at most ε {mechanism.epsilon:g} at δ {mechanism.delta:g}, found "
                f"{needed:.4g} with round {entries[-1].round} after {counted(len(entries) - 1, 'round')}; end the "
                "training, or "
                "start over with more noise"
            )

    def _of(self, entries: Sequence[Entry], delta: float) -> float:
        key = len(entries), delta
        if key not in self._known:
            self._known[key] = self._epsilon([(entry.noise, entry.sampling) for entry in entries], delta)
        return self._known[key]

    def _write(self, entries: Sequence[Entry]) -> None:
        data = {"format": FORMAT, "version": 1, "secret": self._secret.hex(), "spent": [*map(asdict, entries)]}
        with replacing_file(self._path, mode=0o600) as temporary:
            temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="ascii")


def _read(path: Path) -> tuple[bytes, tuple[Entry, ...]]:
    """The secret and the entries.

    Raises:
        InputError: Others can read the file, or it is damaged.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if sys.platform != "win32" and mode & 0o077:
        raise InputError(
            f"{path}: expected a ledger that its owner alone can read (mode 600), found mode {mode:o}: others may have "
            "read its secret, which takes the noise off what was released; type chmod 600"
        )
    try:
        data: Any = strict_json(read_text(path))
        secret, entries = bytes.fromhex(data["secret"]), tuple(Entry(**entry) for entry in data["spent"])
        if (data["format"], data["version"], len(secret)) != (FORMAT, 1, 32) or not all(map(_is_valid, entries)):
            raise ValueError("other fields")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected the ledger of a privacy budget, found a damaged file ({error}); bring back a copy"
        ) from error
    return secret, entries


def _is_valid(entry: Entry) -> bool:
    numbers = (entry.noise, entry.sampling)
    return (
        all(type(number) in (int, float) for number in numbers)
        and 0 < entry.noise <= sys.float_info.max
        and 0 < entry.sampling <= 1
    )


@contextmanager
def open_privacy_ledger(folder: Path, epsilon: Epsilon) -> Iterator[PrivacyLedger]:
    """Lock the ledger in a folder, made if it is missing, for as long as the context lasts.

    Raises:
        BusyError: Another process uses it.
        InputError: The folder can't be made or locked, or the ledger is damaged.
    """
    with hold_folder(folder, kind="the ledger of a privacy budget"):
        yield PrivacyLedger(folder / FILE, epsilon)
