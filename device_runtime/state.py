"""The state folder: what a device keeps between calls, and the progress of an unfinished call.

    lock                   held by the process that uses the folder; empty
    client                 the device's name, made once: one line of UTF-8
    lasting.safetensors    the committed state: what the last finished call left behind
    pending.safetensors    the next committed state, of a call whose update is about to be written; absent otherwise
    pending.json           {"output": absolute path of that update, "update": its header}; absent otherwise
    progress.safetensors   an unfinished call; absent otherwise

Both `.safetensors` files (container: `fedpara_edge.storage.tensorfile`) hold *groups* of tensors, a group being a
mapping from names to arrays of any shape and dtype; whatever is kept besides the personal tensors is one more group.

`fedpara-edge/device-state`, version 1: header `format, version, fingerprint, call`; tensors `before/<group>/<name>`
and `after/<group>/<name>`, as they were when that call began and when it ended. The group `personal` holds the personal
tensors; by shared tensor, `residual` holds what a lossy codec has not sent yet, `control` SCAFFOLD's c_i, and `dynamic`
FedDyn's ∇_i (`fedpara_edge.algorithms`).

`fedpara-edge/progress`, version 1: header `format, version, fingerprint, call, output, step, seconds, loss_sums` as in
`Progress`; tensors `<group>/<name>`. The group `engine` holds the state of the engine.

A *call* is everything that decides the outcome of a training: round, base weights, data, options. A call ends with some
commits, each one rename or removal: its last progress, the pending state and what it waits for, the update, the
committed state, the removal of the rest. Cut short between any two, the same call again finds its progress, takes no
further step and commits the same bytes; cut short after the last, it begins from `before` again. So a repeated call
never trains the personal tensors twice, and never adds to what an algorithm keeps twice. Another call first completes
what is left of the one before: where its update is in place, the server may have it, and the pending state counts.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedpara_edge.errors import InputError, WrongBundleError
from fedpara_edge.formats.update import EncodedUpdate, is_update
from fedpara_edge.storage.atomic import remove_leftovers, replacing_file
from fedpara_edge.storage.locking import hold
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors
from fedpara_edge.storage.tensortable import strict_json

COMMITTED_FORMAT = "fedpara-edge/device-state"
PROGRESS_FORMAT = "fedpara-edge/progress"
COMMITTED, PENDING, PROMISE = "lasting.safetensors", "pending.safetensors", "pending.json"
PROGRESS, CLIENT = "progress.safetensors", "client"

Groups = Mapping[str, Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Committed state: what a finished call leaves behind.

    Args:
        call: Identity of the call, plain JSON data.
        before: Groups as they were when the call began.
        after: Groups as they were when it ended.
    """

    call: Mapping[str, Any]
    before: Groups
    after: Groups

    def start_of(self, call: Mapping[str, Any]) -> Groups:
        """Groups with which a call begins: `after`, or `before` if it repeats the finished call.

        Another call of the same round goes on from the personal tensors, but its update replaces that of the finished
        call, so whatever else is kept is as it was before the round. A call of an earlier round means that the
        federation has begun anew and what its server kept is gone: only the personal tensors go on.
        """
        if call == self.call:
            return self.before
        if call["round"] < self.call["round"]:
            return {name: self.after[name] for name in ("personal",) if name in self.after}
        if all(call.get(key) == self.call.get(key) for key in ("round", "base")):
            return {**self.before, **{name: self.after[name] for name in ("personal",) if name in self.after}}
        return self.after


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a call.

    Args:
        call: Identity of the call, plain JSON data.
        output: Absolute path of the update that the call will write.
        step: Number of steps taken.
        seconds: Time that the steps took, in seconds.
        loss_sums: Sum of the loss over the examples seen, for each epoch begun.
        groups: Groups of tensors to continue with.
    """

    call: Mapping[str, Any]
    output: str
    step: int
    seconds: float
    loss_sums: tuple[float, ...]
    groups: Groups


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
            return self._client.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self._client}: expected the device's name, found {error}; write one there") from error

    def committed(self) -> Committed | None:
        """Committed state of the last finished call; None before the first.

        Raises:
            InputError: The file is damaged.
            WrongBundleError: The state belongs to another bundle.
        """
        remedy = "delete it to begin from the bundle's initial personal tensors"
        if (content := self._read(self._committed, COMMITTED_FORMAT, remedy)) is None:
            return None
        header, groups = content
        return Committed(
            call=header["call"], before=_nested(groups.get("before", {})), after=_nested(groups.get("after", {}))
        )

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
        moments = {"before": _flat(committed.before), "after": _flat(committed.after)}
        self._write(self._pending, moments, {"format": COMMITTED_FORMAT, "call": committed.call})
        promise = {"output": str(output.absolute()), "update": dict(update.header)}
        with replacing_file(self._promise) as temporary:
            temporary.write_text(json.dumps(promise), encoding="utf-8")
        update.write(output)
        self.settle()

    def settle(self) -> None:
        """Commit the pending state, if there is one and its update is in place, and drop it if not."""
        if not self._promise.exists() and not self._pending.exists():
            return
        if self._promise.exists() and self._pending.exists() and self._is_kept():
            self._pending.replace(self._committed)
        self._promise.unlink(missing_ok=True)
        self._pending.unlink(missing_ok=True)

    def _is_kept(self) -> bool:
        """Whether the promised update is in place."""
        try:
            promise = strict_json(self._promise.read_text(encoding="utf-8"))
            return is_update(Path(promise["output"]), promise["update"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def progress(self) -> Progress | None:
        """Progress of an unfinished call; None if there is none.

        Raises:
            InputError: The file is damaged.
            WrongBundleError: The progress belongs to another bundle.
        """
        remedy = "delete it to begin its call again"
        if (content := self._read(self._progress, PROGRESS_FORMAT, remedy)) is None:
            return None
        header, groups = content
        return Progress(
            call=header["call"],
            output=header["output"],
            step=header["step"],
            seconds=header["seconds"],
            loss_sums=tuple(header["loss_sums"]),
            groups=groups,
        )

    def save_progress(self, progress: Progress) -> None:
        """Replace the progress, atomically.

        Raises:
            FedparaError: The disk refuses the write.
        """
        fields = {
            "format": PROGRESS_FORMAT,
            "call": progress.call,
            "output": progress.output,
            "step": progress.step,
            "seconds": progress.seconds,
            "loss_sums": list(progress.loss_sums),
        }
        self._write(self._progress, progress.groups, fields)

    def remove_progress(self) -> None:
        """Delete the progress, if there is any."""
        self._progress.unlink(missing_ok=True)

    def _write(self, path: Path, groups: Groups, fields: Mapping[str, Any]) -> None:
        write_tensors(path, _flat(groups), {"version": 1, "fingerprint": self._fingerprint, **fields})

    def _read(
        self, path: Path, format: str, remedy: str
    ) -> tuple[Mapping[str, Any], dict[str, dict[str, NDArray[Any]]]] | None:
        if not path.exists():
            return None
        with TensorFile(path, format=format, error=InputError, remedy=remedy) as file:
            found = str(file.header.get("fingerprint"))
            if found != self._fingerprint:
                raise WrongBundleError(
                    f"{path}: expected the state of bundle {self._fingerprint[:12]}…, found that of {found[:12]}…; "
                    "give each bundle a state folder of its own"
                )
            return file.header, _nested({name: file.read(name) for name in file.entries})


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
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: expected a writable state folder, found {error.strerror}; choose another"
        ) from error
    with hold(folder / "lock", folder=folder, kind="a state folder"):
        _remove_leftovers(folder)
        state = DeviceState(folder, fingerprint)
        state.settle()
        yield state


def _remove_leftovers(folder: Path) -> None:
    """Remove what a power cut left behind, which may be as large as a whole progress."""
    names = (COMMITTED, PENDING, PROMISE, PROGRESS, CLIENT)
    for name in names:
        remove_leftovers(folder / name)
    for file in folder.glob(".*"):  # of releases up to 0.2
        if file.is_file() and file.name.startswith((".tmp", *(f".{name}." for name in names))):
            file.unlink()


def _flat(groups: Groups) -> dict[str, NDArray[Any]]:
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def _nested(tensors: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    for path, tensor in tensors.items():
        group, _, name = path.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups
