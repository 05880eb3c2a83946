"""The ledger: which update of each client a server accepted in which round, so that none counts twice.

    round-<n>.json    {"format": "fedpara-edge/ledger", "version": 1, "run", "fingerprint", "round", "base",
                       "accepted": {client: SHA-256 of its update}}

one for each of the newest `OPEN_ROUNDS` rounds. An entry is written before the weights that the update went into, and
never changed: the same round done again, after a kill or later, accepts the same updates, and of these clients no
others. Older rounds are closed: nothing is accepted in them any more, so that their entries can be removed. Which ones
these are follows from the newest round in the folder, so that a kill between writing and removing changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedpara_edge.errors import InputError, brief
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.locking import hold_folder
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

FORMAT = "fedpara-edge/ledger"
OPEN_ROUNDS = 100
"""Number of rounds, the newest among them, in which an update can still be accepted."""


class Ledger:
    """A ledger that this process alone may write; `open_ledger` makes it.

    Args:
        folder: Folder of the ledger.
        run: Name of the run that it is about.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run

    @property
    def oldest_open(self) -> int:
        """The oldest round that is not closed."""
        return max(self._rounds(), default=0) - OPEN_ROUNDS + 1

    def accepted(self, round: int) -> Mapping[str, str]:
        """SHA-256 of the update that was accepted of each client in a round.

        Raises:
            InputError: The file is damaged, or of another run.
        """
        path = self._path(round)
        if not path.exists():
            return {}
        try:
            data = strict_json(read_text(path))
            found, entries = (data["format"], data["version"], data["round"]), data["accepted"]
            run = data["run"]
            if found != (FORMAT, 1, round) or not all(isinstance(text, str) for text in entries.values()):
                raise ValueError("other fields")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: expected the ledger of round {round}, found a damaged file ({error}); bring back a copy"
            ) from error
        if run != self._run:
            raise InputError(
                f"{path}: expected the ledger of run {self._run!r}, found that of {brief(run)}; give each run a ledger "
                "of its own"
            )
        return dict(entries)

    def record(self, accepted: Mapping[str, str], *, fingerprint: str, round: int, base: str) -> None:
        """Add updates of a round that are accepted, in it or later, and remove what is closed by it.

        Args:
            accepted: SHA-256 of the update of each client.
            fingerprint: Fingerprint of the bundle.
            round: Number of the round.
            base: SHA-256 of the weights from which the round started.

        Raises:
            FedparaError: The disk refuses the write.
        """
        data = {
            "format": FORMAT,
            "version": 1,
            "run": self._run,
            "fingerprint": fingerprint,
            "round": round,
            "base": base,
            "accepted": {**accepted, **self.accepted(round)},
        }
        with replacing_file(self._path(round)) as temporary:
            temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        oldest = self.oldest_open
        for earlier in self._rounds():
            if earlier < oldest:
                self._path(earlier).unlink()

    def _rounds(self) -> list[int]:
        names = (re.fullmatch(r"round-(\d+)\.json", path.name) for path in self._folder.iterdir())
        return [int(name[1]) for name in names if name is not None]

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round}.json"


@contextmanager
def open_ledger(folder: Path, run: str) -> Iterator[Ledger]:
    """Lock a ledger, made if it is missing, for as long as the context lasts.

    Raises:
        BusyError: Another process uses it.
        InputError: The folder can't be made or locked.
    """
    with hold_folder(folder, kind="a ledger"):
        yield Ledger(folder, run)
