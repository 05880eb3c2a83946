"""What a device keeps between calls and of an unfinished one, in files (`state` has the formats)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError, WrongBundleError, brief, brief_text
from fedpara_edge.storage.digest import content_digest, read_checked, with_digest
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

COMMITTED_FORMAT = "fedpara-edge/device-state"
PROGRESS_FORMAT = "fedpara-edge/progress"

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


def write_committed(path: Path, committed: Committed, fingerprint: str) -> None:
    """Write a committed state, atomically.

    Raises:
        FedparaError: The disk refuses the write.
    """
    moments = {"before": _flat(committed.before), "after": _flat(committed.after)}
    _write(path, moments, {"format": COMMITTED_FORMAT, "fingerprint": fingerprint, "call": committed.call})


def read_committed(path: Path, fingerprint: str) -> Committed:
    """Read a committed state.

    Raises:
        InputError: The file is missing or damaged, has an impossible field, or a value is not finite.
        WrongBundleError: The state belongs to another bundle.
    """
    remedy = "delete it to begin from the bundle's initial personal tensors"
    header, groups = _read(path, COMMITTED_FORMAT, fingerprint, remedy, {"call": _is_call})
    if other := groups.keys() - {"before", "after"}:
        raise InputError(f"{path}: expected the groups before and after, found {brief(min(other))}; {remedy}")
    for moment, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
                raise InputError(
                    f"{path}: tensor {brief(f'{moment}/{name}')}: expected finite values, found NaN or Inf; {remedy}"
                )
    return Committed(
        call=header["call"], before=_nested(groups.get("before", {})), after=_nested(groups.get("after", {}))
    )


def write_progress(path: Path, progress: Progress, fingerprint: str) -> None:
    """Write the progress of a call, atomically.

    Raises:
        FedparaError: The disk refuses the write.
    """
    fields = {name: value for name, value in vars(progress).items() if name != "groups"}
    _write(path, progress.groups, {"format": PROGRESS_FORMAT, "fingerprint": fingerprint, **fields})


def read_progress(path: Path, fingerprint: str) -> Progress:
    """Read the progress of a call.

    Raises:
        InputError: The file is missing or damaged, or has an impossible field.
        WrongBundleError: The progress belongs to another bundle.
    """
    remedy = "delete it to begin its call again"
    checks = {
        "call": _is_call,
        "output": lambda found: isinstance(found, str),
        "step": _is_natural,
        "seconds": lambda found: _is_finite(found) and found >= 0,
        "loss_sums": lambda found: isinstance(found, list) and all(map(_is_finite, found)),
    }
    header, groups = _read(path, PROGRESS_FORMAT, fingerprint, remedy, checks)
    return Progress(
        call=header["call"],
        output=header["output"],
        step=header["step"],
        seconds=header["seconds"],
        loss_sums=tuple(header["loss_sums"]),
        groups=groups,
    )


def _write(path: Path, groups: Groups, fields: Mapping[str, Any]) -> None:
    tensors = _flat(groups)
    write_tensors(path, tensors, with_digest({"version": 1, **fields}, content_digest(tensors)))


def _read(
    path: Path, format: str, fingerprint: str, remedy: str, checks: Mapping[str, Callable[[Any], bool]]
) -> tuple[Mapping[str, Any], dict[str, dict[str, NDArray[Any]]]]:
    with TensorFile(path, format=format, error=InputError, remedy=remedy) as file:
        found = file.header.get("fingerprint")
        if found != fingerprint:
            raise WrongBundleError(
                f"{path}: expected the state of bundle {fingerprint[:12]}…, found that of "
                f"{brief_text(found, max_length=12)}; give each bundle a state folder of its own"
            )
        for name, fits in checks.items():
            if not fits(file.header.get(name)):
                raise InputError(
                    f"{path}: {name}: expected that of a {format}, found {brief(file.header.get(name))}; {remedy}"
                )
        return file.header, _nested(read_checked(file))


def _is_call(found: Any) -> bool:
    return isinstance(found, dict) and _is_natural(found.get("round")) and isinstance(found.get("base"), str)


def _is_natural(found: Any) -> bool:
    return type(found) is int and 0 <= found <= 1 << 40


def _is_finite(found: Any) -> bool:
    return type(found) in (int, float) and abs(found) <= sys.float_info.max


def _flat(groups: Groups) -> dict[str, NDArray[Any]]:
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def _nested(tensors: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    for path, tensor in tensors.items():
        group, _, name = path.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups
