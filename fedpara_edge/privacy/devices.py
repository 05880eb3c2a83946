"""The budget that a server grants each device for the noise of its own, and the ledger of what the devices spent.

    devices.json    {"format": "fedpara-edge/device-privacy", "version": 1,
                     "spent": {client: [[noise, number of its updates with that noise], …]},
                     "newest": {"base": SHA-256 of the weights before, "updates": {client: [SHA-256, …]}}}

An update is entered before the weights that it went into are written. `newest` has those of the newest round, so that a
round which is done again enters nothing twice. An older round that is done again costs once more than it should, never
less.

The ε of a client is that of `local.epsilon`: of its own updates and their noise, whatever the others send and whatever
becomes of the updates. What protects the data is the device's own ledger, as a refused update has left it already; this
one sees to it that nothing of it goes into weights, and that no device is asked for more.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedpara_edge.errors import BudgetError, InputError
from fedpara_edge.options import check, choose, option
from fedpara_edge.privacy.local import Noise, epsilon_of
from fedpara_edge.privacy.mechanism import MAX_NOISE, MIN_NOISE
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.locking import hold_folder
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

FORMAT = "fedpara-edge/device-privacy"
FILE, LOCK = "devices.json", ".devices.lock"
MAX_UPDATES = 1 << 40


@dataclass(frozen=True, kw_only=True)
class DeviceBudget:
    """The budget of each device, whose updates must state the Gaussian noise on them.

    Args:
        epsilon: Largest ε of all updates of a device together.
        delta: δ at which ε is measured.

    Raises:
        InputError: An option is out of its range.
    """

    epsilon: float = option(above=0, help="Largest ε of all updates of a device together.")
    delta: float = option(above=0, below=1, help="δ at which ε is measured.")

    name: ClassVar[str] = Noise.name

    def __post_init__(self) -> None:
        check(self)


def find_device_budget(text: str) -> DeviceBudget:
    """The budget of each device that a user asks for.

    Args:
        text: Name of the noise, and options after a colon.

    Raises:
        InputError: There is none of that name, or an option is unknown, missing or out of its range.

    >>> find_device_budget("gaussian:epsilon=4,delta=1e-5").epsilon
    4.0
    """
    budget: DeviceBudget = choose({DeviceBudget.name: DeviceBudget}, text, key="device_privacy")
    return budget


@dataclass(frozen=True, kw_only=True)
class Sent:
    """An update of a client: its digest, hexadecimal, and its noise."""

    client: str
    sha256: str
    noise: float


class DeviceLedger:
    """A ledger that this process alone may write; `open_device_ledger` makes it.

    Args:
        path: File of the ledger.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._spent, self._base, self._newest = _read(path) if path.exists() else ({}, "", {})
        self._known: dict[tuple[float, float], float] = {}

    def check(self, budget: DeviceBudget, sent: Sent, base: str) -> None:
        """Refuse an update that takes more than what is left of its client's budget, unless it was entered already.

        Args:
            budget: Budget of each device.
            sent: The update.
            base: SHA-256 of the weights of the round.

        Raises:
            BudgetError: It does.
        """
        if sent.sha256 not in self._entered(base).get(sent.client, ()):
            self._check(budget, sent.client, _with(self._spent, sent))

    def record(self, budget: DeviceBudget, updates: Iterable[Sent], base: str) -> None:
        """Enter the updates that are accepted in a round.

        Raises:
            BudgetError: Several updates of a client take more than what is left of its budget.
            FedparaError: The disk refuses the write.
        """
        spent = dict(self._spent)
        entered = {client: list(digests) for client, digests in self._entered(base).items()}
        for sent in updates:
            if sent.sha256 not in entered.setdefault(sent.client, []):
                spent[sent.client] = _with(spent, sent)
                self._check(budget, sent.client, spent[sent.client])
                entered[sent.client].append(sent.sha256)
        self._write(spent, base, entered)
        self._spent, self._base, self._newest = spent, base, entered

    def _entered(self, base: str) -> Mapping[str, Sequence[str]]:
        return self._newest if base == self._base else {}

    def _check(self, budget: DeviceBudget, client: str, noises: Mapping[float, int]) -> None:
        precision = math.fsum(count / noise**2 for noise, count in noises.items())
        with self._lock:
            if (precision, budget.delta) not in self._known:
                self._known[precision, budget.delta] = epsilon_of(precision, budget.delta)
            needed = self._known[precision, budget.delta]
        if needed > budget.epsilon:
            raise BudgetError(
                f"client {client!r}: expected at most ε {budget.epsilon:g} at δ {budget.delta:g}, found {needed:.4g} "
                f"with its next update after {sum(noises.values()) - 1}; leave the client out from now on"
            )

    def _write(self, spent: Mapping[str, Mapping[float, int]], base: str, newest: Mapping[str, Sequence[str]]) -> None:
        data = {
            "format": FORMAT,
            "version": 1,
            "spent": {client: sorted(noises.items()) for client, noises in sorted(spent.items())},
            "newest": {"base": base, "updates": {client: sorted(found) for client, found in sorted(newest.items())}},
        }
        with replacing_file(self._path) as temporary:
            temporary.write_text(json.dumps(data) + "\n", encoding="ascii")


def _with(spent: Mapping[str, Mapping[float, int]], sent: Sent) -> dict[float, int]:
    """Number of updates of a client by their noise, with one more."""
    found = dict(spent.get(sent.client, {}))
    found[sent.noise] = found.get(sent.noise, 0) + 1
    return found


_Content = tuple[dict[str, dict[float, int]], str, dict[str, list[str]]]


def _read(path: Path) -> _Content:
    """What was spent by client and noise, the weights before the newest round, and its updates by client.

    Raises:
        InputError: The file is damaged.
    """
    try:
        data: Any = strict_json(read_text(path))
        base, updates = data["newest"]["base"], data["newest"]["updates"]
        spent = {client: dict(found) for client, found in data["spent"].items()}
        numbers = [pair for found in spent.values() for pair in found.items()]
        digests = [digest for found in updates.values() for digest in found]
        if (
            (data["format"], data["version"]) != (FORMAT, 1)
            or not all(type(noise) in (int, float) and MIN_NOISE <= noise <= MAX_NOISE for noise, _ in numbers)
            or not all(type(count) is int and 0 < count <= MAX_UPDATES for _, count in numbers)
            or not all(isinstance(text, str) for text in (base, *digests))
            or not all(isinstance(found, list) for found in updates.values())
        ):
            raise ValueError("other fields")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected the ledger of what devices spent, found a damaged file ({error}); bring back a copy"
        ) from error
    return spent, base, updates


@contextmanager
def open_device_ledger(folder: Path) -> Iterator[DeviceLedger]:
    """Lock the ledger in a folder, made if it is missing, for as long as the context lasts.

    Raises:
        BusyError: Another process uses it.
        InputError: The folder can't be made or locked, or the ledger is damaged.
    """
    with hold_folder(folder, kind="the ledger of what devices spent", lock=LOCK):
        yield DeviceLedger(folder / FILE)
