"""What travels between server and device: files of this project, byte for byte, and the few words beside them.

A *call* asks a device to train one round. With it come the files that the device lacks, by name:

    bundle/<name>   each file of the bundle, for a device that was not heard of before
    weights         the weights to start from
    change-<n>      the change from the weights of round n - 1 to those of round n, for a device that has these
    control         the part of the server state that devices need for scaffold

An *answer* has the file `update`, with its envelope in the file `signature` if the device has a key; or it says what
the device lacks (`bundle`, `weights`), or why it refuses (a code of `fedpara_edge.errors` and a sentence).

Flower's records carry them, few, as each record is a request of its own in all six hops of a message and its answer:
words, numbers and small files, as bytes, are in the `ConfigRecord` `message`, and large files, which Flower sends in
pieces, as arrays of uint8 in the `ArrayRecord` `large`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedpara_edge.errors import InvalidUpdateError, brief, brief_text
from fedpara_edge.storage.tensortable import strict_json

SMALL_BYTES = 1 << 20
"""Size up to which a file is sent in one piece."""

Files = Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call to train.

    Args:
        fingerprint: Fingerprint of the bundle.
        round: Round to train in, which is that of the weights.
        base: Digest of these weights (`fedpara_edge.formats.weights.Weights.base`).
        options: Options of the training (`device_runtime.config.TrainCall`), plain data.
        run: Name of the run that updates are signed for; empty if they are not.
        files: Files that come with it.
    """

    fingerprint: str
    round: int
    base: str
    options: Mapping[str, Any]
    run: str = ""
    files: Files = field(default_factory=dict)

    def content(self) -> RecordDict:
        """The call as Flower carries it."""
        words = {
            "fingerprint": self.fingerprint,
            "base": self.base,
            "options": json.dumps(self.options),
            "run": self.run,
        }
        return _content(words, {"round": self.round}, self.files)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer to a call.

    Args:
        lacks: Things that the device needs before it can train, separated by spaces; empty for none.
        code: Code of the reason why it does not train; empty if it does.
        message: Reason why it does not train.
        numbers: Numbers of the training.
        files: Files that come with it.
    """

    lacks: str = ""
    code: str = ""
    message: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    files: Files = field(default_factory=dict)

    def content(self) -> RecordDict:
        """The answer as Flower carries it."""
        words = {"lacks": self.lacks, "code": self.code, "message": self.message}
        return _content(words, self.numbers, self.files)


def read_call(content: RecordDict) -> Call:
    """The call in a message.

    Raises:
        InvalidUpdateError: There is none.
    """
    said, files = _parts(content)
    return Call(
        fingerprint=_word(said, "fingerprint"),
        round=int(_number(said, "round")),
        base=_word(said, "base"),
        options=_options(_word(said, "options")),
        run=_word(said, "run"),
        files=files,
    )


def read_answer(content: RecordDict) -> Answer:
    """The answer in a message.

    Raises:
        InvalidUpdateError: There is none.
    """
    said, files = _parts(content)
    return Answer(
        lacks=_word(said, "lacks"),
        code=_brief_word(said, "code", 40),
        message=_brief_word(said, "message", 600),
        numbers={name: float(value) for name, value in said.items() if isinstance(value, int | float)},
        files=files,
    )


def _content(words: Mapping[str, str], numbers: Mapping[str, float], files: Files) -> RecordDict:
    small = {name: content for name, content in files.items() if len(content) <= SMALL_BYTES}
    content = RecordDict({"message": ConfigRecord({**words, **numbers, **small})})
    if large := {name: Array(np.frombuffer(files[name], np.uint8)) for name in files.keys() - small.keys()}:
        content["large"] = ArrayRecord(large)
    return content


def _parts(content: RecordDict) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """Words and numbers of a message, and its files."""
    try:
        said = content.config_records["message"]
        files = {name: each for name, each in said.items() if isinstance(each, bytes)}
        if "large" in content:
            files |= {name: each.numpy().tobytes() for name, each in content.array_records["large"].items()}
        return {name: each for name, each in said.items() if name not in files}, files
    except Exception as error:  # whatever another program put there
        found = brief_text(str(error) or type(error).__name__)
        raise InvalidUpdateError(f"expected a message of fedpara-edge, found another ({found})") from error


def _word(words: Mapping[str, Any], name: str) -> str:
    value = words.get(name)
    if not isinstance(value, str):
        raise InvalidUpdateError(f"expected a message of fedpara-edge with {name!r}, found one without")
    return value


def _options(text: str) -> dict[str, Any]:
    try:
        options = strict_json(text)
    except ValueError as error:
        raise InvalidUpdateError(f"options: expected JSON, found {error}") from error
    if not isinstance(options, dict):
        raise InvalidUpdateError(f"options: expected a mapping, found {brief(options)}")
    return options


def _brief_word(words: Mapping[str, Any], name: str, max_length: int) -> str:
    word = _word(words, name)
    return brief_text(word, max_length=max_length) if word else ""


def _number(numbers: Mapping[str, Any], name: str) -> float:
    value = numbers.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidUpdateError(f"expected a message of fedpara-edge with {name!r}, found one without")
    return value
