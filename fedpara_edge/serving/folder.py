"""The server's state folder.

.lock                             held by the server that runs; empty
key                               secret of the tokens (`tokens`)
run.json                          {"format", "version", "fingerprint"}: the bundle that the folder belongs to
devices.jsonl                     a line for each device that joined (`devices`)
weights/round-<n>.safetensors     weights after n rounds, from 1 on
changes/round-<n>.safetensors     from the weights of the round before to these
server/round-<n>.safetensors      server state that belongs with them
control/round-<n>.safetensors     its part that devices need for scaffold
rounds/<n>/                       the round that starts from the weights of n (`rounds`)
uploads/<id>/                     an update that is still arriving (`uploads`)
ledger/, privacy/                 what was accepted of signed updates, and what is spent (`guarding`)
metrics.jsonl                     what came of the rounds, for `report` and trackers (`record`)
tls/                              certificates made for the local network (`certificates`)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.errors import InputError, WrongBundleError, brief_text
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.storage.atomic import remove_leftovers_in, replacing_file
from fedpara_edge.storage.locking import hold_folder, make_folder
from fedpara_edge.storage.rounds import round_path, rounds_in
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

FORMAT = "fedpara-edge/serving"
_FOLDERS = ("weights", "changes", "server", "control", "rounds", "uploads")


@dataclass(frozen=True)
class ServerFolder:
    """The state folder of a server.

    Args:
        path: The folder.
        bundle: Bundle that is trained.
    """

    path: Path
    bundle: Bundle

    @property
    def newest(self) -> int:
        """Number of rounds behind the newest weights."""
        return max(rounds_in(self.path / "weights"), default=0)

    @property
    def server(self) -> Path:
        """Folder of the server states."""
        return self.path / "server"

    @property
    def uploads(self) -> Path:
        """Folder of what is arriving."""
        return self.path / "uploads"

    @property
    def devices(self) -> Path:
        """Journal of the devices."""
        return self.path / "devices.jsonl"

    def weights(self, number: int) -> Path:
        """Weights after `number` rounds; those of the bundle before the first."""
        return round_path(self.path / "weights", number) if number else self.bundle.file(WEIGHTS)

    def change(self, number: int) -> Path:
        """Change from the weights of the round before to those after `number` rounds."""
        return round_path(self.path / "changes", number)

    def control(self, number: int) -> Path:
        """Server state that devices need for scaffold besides the weights after `number` rounds."""
        return round_path(self.path / "control", number)

    def round(self, number: int) -> Path:
        """Folder of the round that starts from the weights after `number` rounds."""
        return self.path / "rounds" / str(number)


@contextmanager
def open_folder(path: Path, bundle: Bundle) -> Iterator[ServerFolder]:
    """Lock a state folder, made if it is missing, for as long as the context lasts.

    Raises:
        BusyError: Another server uses it.
        InputError: It can't be made or locked, or has something else in it.
        WrongBundleError: It belongs to another bundle.
    """
    with hold_folder(path, kind="a state folder", parents=False):
        _claim(path, bundle.manifest.fingerprint)
        for name in _FOLDERS:
            make_folder(path / name, kind="a folder of `serve`")
        remove_leftovers_in(path)
        yield ServerFolder(path, bundle)


def _claim(path: Path, fingerprint: str) -> None:
    """Compare a folder with the bundle, or write for which one it is from now on."""
    file = path / "run.json"
    if not file.exists():
        if any(entry.name != ".lock" for entry in path.iterdir() if not entry.name.startswith(".run.json.")):
            raise InputError(f"{path}: expected an empty folder, or one of `serve`, found another; choose another")
        with replacing_file(file) as temporary:
            content = {"format": FORMAT, "version": 1, "fingerprint": fingerprint}
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    try:
        found = strict_json(read_text(file))
        stated = found["fingerprint"] if (found["format"], found["version"]) == (FORMAT, 1) else None
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{file}: expected a bundle's fingerprint, found {error}; choose another folder") from error
    if stated != fingerprint:
        raise WrongBundleError(
            f"{path}: expected the state of bundle {fingerprint[:12]}…, found that of "
            f"{brief_text(stated, max_length=12)}; choose another folder, or the bundle with which it began"
        )
