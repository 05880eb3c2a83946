"""The state folder: what a device keeps between calls, and the progress of an unfinished call.

    lock                   held by the process that uses the folder; empty
    client                 the device's name, made once: one line of UTF-8
    lasting.safetensors    the committed state: what the last finished call left behind
    pending.safetensors    the next committed state, of a call whose update is about to appear; absent otherwise
    pending.json           the promise of that update: {"output": its absolute path, "waiting": name of the folder
                           beside it in which the complete update waits for its rename}; absent otherwise
    progress.safetensors   an unfinished call; absent otherwise
    tuning.json            the fastest way to take a step here, if it was measured (`device_runtime.tuning`)
    privacy.json           what was spent of the privacy budget, and the secret of the noise
                           (`fedpara_edge.privacy.ledger`); absent without noise

The `.safetensors` files (container: `fedpara_edge.storage.tensorfile`) hold *groups* of tensors, a group being a
mapping from names to arrays of any shape and dtype; whatever is kept besides the personal tensors is one more group.
Their headers have a `digest` (`fedpara_edge.storage.digest`), without which those of releases up to 0.2 are read too.

`fedpara-edge/device-state`, version 1: header `format, version, fingerprint, call`; tensors `before/<group>/<name>`
and `after/<group>/<name>`, as they were when that call began and when it ended. The group `personal` holds the personal
tensors; by shared tensor, `residual` holds what a lossy codec has not sent yet, `control` SCAFFOLD's c_i, and `dynamic`
FedDyn's ∇_i (`fedpara_edge.algorithms`).

`fedpara-edge/progress`, version 1: header `format, version, fingerprint, call, output, step, seconds, loss_sums` as in
`Progress`; tensors `<group>/<name>`. The group `engine` holds the state of the engine.

A *call* is everything that decides the outcome of a training: round, base weights, data, options. A call ends with some
commits, each one rename or removal: its last progress, the pending state, the promise, the update, the committed state,
the removal of the rest. Cut short between any two, the same call again finds its progress, takes no further step and
commits the same bytes; cut short after the last, it begins from `before` again. So a repeated call never trains the
personal tensors twice, and never adds to what an algorithm keeps twice.

Another call first settles what is left of the one before. The promise is made when the update is complete, so from then
on the update waits in its folder or was renamed. If it waits, it was never sent: the pending state is dropped, and then
the update. If it does not, it may have been sent, wherever it is by now: the pending state is committed.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from device_runtime.statefiles import (
    Committed,
    Groups,
    Progress,
    read_committed,
    read_progress,
    write_committed,
    write_progress,
)
from fedpara_edge.errors import InputError
from fedpara_edge.formats.update import EncodedUpdate, is_update
from fedpara_edge.storage.atomic import remove_leftovers, remove_leftovers_in, replacing_file, sync
from fedpara_edge.storage.locking import hold_folder
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

COMMITTED, PENDING, PROMISE = "lasting.safetensors", "pending.safetensors", "pending.json"
PROGRESS, CLIENT = "progress.safetensors", "client"


class DeviceState:
    """A state folder; one that is to be changed comes from `open_state`, which locks it.

    Args:
        folder: The folder.
        fingerprint: Fingerprint of the bundle whose state it keeps.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._committed = folder / COMMITTED
        self._pending = folder / PENDING
        self._promise = folder / PROMISE
        self._progress = folder / PROGRESS
        self._client = folder / CLIENT

    def client(self) -> str:
        """Name of the device: 16 random hexadecimal digits, made when first asked for.

        Raises:
            InputError: The file that holds the name can't be read.
        """
        if not self._client.exists():
            with replacing_file(self._client) as temporary:
                temporary.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        try:
            return read_text(self._client).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self._client}: expected the device's name, found {error}; write one there") from error

    def committed(self) -> Committed | None:
        """Committed state of the last finished call; None before the first.

        Raises:
            InputError: The file is damaged.
            WrongBundleError: The state belongs to another bundle.
        """
        return read_committed(self._committed, self._fingerprint) if self._committed.exists() else None

    def groups_for(self, call: Mapping[str, Any]) -> Groups:
        """Groups with which a call begins; none before the first call.

        Raises:
            InputError: The file of the committed state is damaged.
            WrongBundleError: The state belongs to another bundle.
        """
        if (committed := self.committed()) is None:
            return {}
        groups = committed.start_of(call)
        if dropped := sorted(committed.after.keys() - groups.keys()) if call != committed.call else []:
            print(
                f"{self.folder}: dropped {', '.join(dropped)} of round {committed.call['round']}, as round "
                f"{call['round']} begins without them",
                file=sys.stderr,
            )
        return groups

    def commit(self, committed: Committed, update: EncodedUpdate, output: Path) -> None:
        """Write the update of a call and commit what the call leaves behind: both or neither.

        Args:
            committed: State to commit.
            update: Update to write.
            output: File to write it to.

        Raises:
            FedparaError: The disk refuses a write.
        """
        write_committed(self._pending, committed, self._fingerprint)
        try:
            update.write(output, ready=self._give_promise)
        except BaseException:
            if not is_update(output, update.header):
                self._promise.unlink(missing_ok=True)
            raise
        self.settle()

    def settle(self) -> None:
        """Commit the pending state, if there is one and its update was renamed to its output, and drop it if not.

        Raises:
            InputError: The promise is damaged.
        """
        if not self._promise.exists() and not self._pending.exists():
            return
        waiting = self._waiting()
        if waiting is not None and not waiting.exists() and self._pending.exists():
            self._pending.replace(self._committed)
            sync(self.folder)
        self._promise.unlink(missing_ok=True)
        sync(self.folder)
        self._pending.unlink(missing_ok=True)
        if waiting is not None:
            remove_leftovers(waiting.parent.with_name(waiting.name))

    def _give_promise(self, complete: Path, output: Path) -> None:
        """Promise a complete update, which is about to be renamed to `output`."""
        promise = {"output": str(output), "waiting": complete.parent.name}
        with replacing_file(self._promise) as temporary:
            temporary.write_text(json.dumps(promise), encoding="utf-8")

    def _waiting(self) -> Path | None:
        """Path at which the promised update waits for its rename, if it still does; None without a promise."""
        if not self._promise.exists():
            return None
        try:
            promise = strict_json(read_text(self._promise))
            output = Path(promise["output"])
            waiting = output.with_name(Path(promise["waiting"]).name) / output.name
            waiting.exists()  # or else the name is one that the system refuses
            return waiting
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._promise}: expected the place of an update, found a damaged file; delete it, and the state of "
                "that update does not count"
            ) from error

    def progress(self) -> Progress | None:
        """Progress of an unfinished call; None if there is none.

        Raises:
            InputError: The file is damaged.
            WrongBundleError: The progress belongs to another bundle.
        """
        return read_progress(self._progress, self._fingerprint) if self._progress.exists() else None

    def save_progress(self, progress: Progress) -> None:
        """Replace the progress, atomically.

        Raises:
            FedparaError: The disk refuses the write.
        """
        write_progress(self._progress, progress, self._fingerprint)

    def remove_progress(self) -> None:
        """Delete the progress, if there is any."""
        self._progress.unlink(missing_ok=True)


@contextmanager
def open_state(folder: Path, fingerprint: str) -> Iterator[DeviceState]:
    """Lock a state folder, made if it is missing, for as long as the context lasts.

    Args:
        folder: State folder.
        fingerprint: Fingerprint of the bundle whose state it keeps.

    Raises:
        BusyError: Another process uses the folder.
        InputError: The folder can't be made or locked.
    """
    with hold_folder(folder, kind="a state folder", lock="lock", parents=False):
        _remove_leftovers(folder)
        state = DeviceState(folder, fingerprint)
        state.settle()
        yield state


def _remove_leftovers(folder: Path) -> None:
    """Remove what a power cut left behind, which may be as large as a whole progress."""
    remove_leftovers_in(folder)
    names = (COMMITTED, PENDING, PROMISE, PROGRESS, CLIENT)
    for file in folder.glob(".*"):  # of releases up to 0.2
        if file.is_file() and file.name.startswith((".tmp", *(f".{name}." for name in names))):
            file.unlink()
