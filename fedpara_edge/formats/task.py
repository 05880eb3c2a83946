"""The task: what a server asks of a device, `task.json`.

JSON. Addresses count from that of the task itself.

    format, version   fedpara-edge/task, 1
    fingerprint       hexadecimal; of the bundle
    round             of the weights from which to train
    base              SHA-256 of these weights (`weights`)
    phase             "open", "closing", "paused" or "finished": whether updates of the round are taken, and whether
                      there will be more rounds
    train             whether this device is to train now and send an update
    reason            sentence that says why not; null where it is to
    code              the same in one word: "closing", "paused", "finished", "sent" (its update is there), "drawn"
                      (others were, for this round), "unlisted" (the server's list of clients lacks it) or "revoked"
                      (its key was); left out where it is to
    bundle            folder of the bundle
    weights           whole weights of the round
    history           [{"base", "change", "bytes"}, …]: changes that lead to the weights, each from those with the
                      SHA-256 `base` to those of the next, the newest last; a device that has one of them needs no
                      whole weights
    control           server state of the round, for scaffold; left out where there is none
    updates           where updates are sent
    settings          options of the training by name, as `fedpara-edge train` has them, and its codec
    run               name of the run for which updates have to be signed (`fedpara_edge.trust.envelope`); left out
                      where they need not

All addresses but that of updates contain a SHA-256 of what they lead to, so that it can be kept for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from fedpara_edge.errors import FedparaError, brief
from fedpara_edge.storage.tensortable import strict_json

FORMAT = "fedpara-edge/task"
_LEFT_OUT = ("control", "run", "code")
Phase = Literal["open", "closing", "paused", "finished"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A change from the weights of one round to those of the next.

    Args:
        base: SHA-256 of the weights that it applies to.
        change: Address of the change file.
        bytes: Size of that file.
    """

    base: str
    change: str
    bytes: int


class Obstacle(NamedTuple):
    """The reason why a device is not to train now.

    Args:
        code: One word, of those that the module lists.
        reason: Sentence.
    """

    code: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task; the module describes the fields."""

    fingerprint: str
    round: int
    base: str
    phase: Phase
    train: bool
    reason: str | None
    bundle: str
    weights: str
    history: tuple[Step, ...]
    control: str | None
    updates: str
    settings: Mapping[str, Any]
    run: str | None = None
    code: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        fields = {"format": FORMAT, "version": 1, **asdict(self)}
        return {name: value for name, value in fields.items() if name not in _LEFT_OUT or value is not None}

    def changes_from(self, base: str) -> list[Step] | None:
        """The changes that lead to the weights of the round; none from these themselves, None from unknown ones.

        Args:
            base: SHA-256 of the weights that are there.
        """
        if base == self.base:
            return []
        bases = [step.base for step in self.history]
        return list(self.history[bases.index(base) :]) if base in bases else None


def read_task(content: bytes, *, source: str) -> Task:
    """The task in an answer of a server.

    Args:
        content: The answer.
        source: Address that it came from, for an error.

    Raises:
        FedparaError: It is no task of version 1.
    """
    try:
        data = strict_json(content.decode("utf-8"))
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, 1):
            raise ValueError("something else")
        for name, fits in _FITTING.items():
            if not fits(data.get(name)):
                raise ValueError(f"{name} {brief(data.get(name))}")
        fields: dict[str, Any] = {name: data.get(name) for name in Task.__dataclass_fields__}
        return Task(**{**fields, "history": tuple(Step(**step) for step in data["history"])})
    except (TypeError, UnicodeDecodeError, ValueError) as error:
        raise FedparaError(
            f"{source}: expected a task of version 1, found {error}; check the address, or update this device"
        ) from error


def _is_text(found: Any) -> bool:
    return isinstance(found, str) and found.isprintable() and found != ""


def _is_number(found: Any) -> bool:
    return type(found) is int and found >= 0


def _are_steps(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(step, dict) and _is_text(step.get("base")) and _is_text(step.get("change")) for step in found
    )


_FITTING: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("fingerprint", "base", "bundle", "weights", "updates"), _is_text),
    "round": _is_number,
    "phase": lambda found: found in get_args(Phase),
    "train": lambda found: type(found) is bool,
    "reason": lambda found: found is None or _is_text(found),
    "control": lambda found: found is None or _is_text(found),
    "run": lambda found: found is None or _is_text(found),
    "code": lambda found: found is None or _is_text(found),
    "history": _are_steps,
    "settings": lambda found: isinstance(found, dict),
}
"""Functions that tell whether a field may be what was found."""
