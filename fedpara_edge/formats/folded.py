"""The folded model: an ONNX file that any ONNX runtime runs, and that describes itself.

It takes the bundle's raw input and gives its outputs [B, ...] in float32, with every weight composed. One entry of its
`metadata_props` is ours: its key is `fedpara_edge`, its value canonical JSON (sorted keys, no spaces, UTF-8):

    format        fedpara-edge/folded
    version       1 where the first entries of `formats.interface` can describe the model, 2 otherwise
    model         name given at export
    fingerprint   hexadecimal; of the bundle from which it was folded
    round         of its weights
    precision     float32, float16 or int8: the type in which its weights are stored
    personal      whether it contains a device's own personal tensors
    input, label, output, loss; in version 2 inputs, heads, others
                  as in the bundle's manifest

In int8, an entry `session.x64quantprecision` with the value 1 says that sessions of onnxruntime need this option to
compute what `fold` measured: products of 8-bit numbers saturate without it on x86 without VNNI. Files of releases up to
0.2 have none, and run without, as that option crashes onnxruntime on their LSTM and GRU.

The last field of the file is an entry as well, `fedpara_edge.sha256`: the hexadecimal SHA-256 of all bytes before it.
Releases up to 0.2 pass over it. Files of theirs have none, and are read without.

The entries are read here without onnx or onnxruntime. An ONNX file is a protobuf message (`storage.protobuf`). Field 14
of an ONNX model, type 2, is an entry of `metadata_props`: a message with the key as field 1 and the value as field 2,
both of type 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedpara_edge.errors import InputError
from fedpara_edge.formats.graphfile import check_graph, read_content
from fedpara_edge.formats.interface import Interface
from fedpara_edge.storage.protobuf import fields
from fedpara_edge.storage.tensortable import strict_json

FORMAT = "fedpara-edge/folded"
METADATA_KEY = "fedpara_edge"
DIGEST_KEY = "fedpara_edge.sha256"
MAX_ENTRY_BYTES = 1 << 20
INT8_OPTIONS = {"session.x64quantprecision": "1"}
"""Entries of a model in int8, and options of sessions."""

Precision = Literal["float32", "float16", "int8"]

_METADATA_PROPS = 14


@dataclass(frozen=True, kw_only=True)
class FoldedSpec:
    """Description of a folded model in its own file; the module describes the fields."""

    model: str
    fingerprint: str
    round: int
    precision: Precision
    personal: bool
    interface: Interface

    def to_json(self) -> str:
        """Value of the entry `fedpara_edge`."""
        data = {"format": FORMAT, "version": 1 if self.interface.is_first else 2, **self.to_plain()}
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    def to_plain(self) -> dict[str, Any]:
        """Fields as plain data, without format and version."""
        own = {name: value for name, value in vars(self).items() if name != "interface"}
        return {**own, **self.interface.to_json()}

    @staticmethod
    def from_json(text: str) -> FoldedSpec:
        """Inverse of `to_json`.

        Raises:
            ValueError: The text is not JSON, has another format or version, or a field is missing or unknown.
        """
        data = strict_json(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") not in (1, 2):
            raise ValueError(f"another format than {FORMAT} version 1 or 2")
        own = ("model", "fingerprint", "round", "precision", "personal")
        try:
            interface = Interface.from_json(data, first=data["version"] == 1)
            spec = FoldedSpec(**{name: data[name] for name in own}, interface=interface)
        except (AttributeError, KeyError, TypeError, InputError) as error:
            raise ValueError(f"other fields ({error})") from error
        if data.keys() != spec.to_plain().keys() | {"format", "version"}:
            raise ValueError("other fields")
        known = spec.precision in get_args(Precision)
        if not known or type(spec.round) is not int or type(spec.personal) is not bool:
            raise ValueError("fields with other values")
        return spec


def with_digest(model: bytes) -> bytes:
    """A serialized model with the digest of itself at its end."""
    return model + _digest_entry(model)


def read_folded(path: Path) -> tuple[FoldedSpec, bytes]:
    """Description of a folded model, and the model itself, serialized and checked (`graphfile`).

    Raises:
        InputError: There is no file at `path`, or it is not an ONNX model that `fedpara-edge fold` wrote.
    """
    remedy = "use a model written by fedpara-edge fold"
    try:
        content = read_content(path)
        entries = dict(_metadata(memoryview(content)))
        if METADATA_KEY not in entries:
            raise ValueError(f"no entry {METADATA_KEY!r} in the metadata")
        if DIGEST_KEY in entries:
            _check_digest(content)
        spec = FoldedSpec.from_json(entries[METADATA_KEY])
        check_graph(content)
        return spec, content
    except OSError as error:
        raise InputError(f"{path}: expected a folded model, found {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected a folded model, found {error}; {remedy}") from error


def stated_options(model: bytes) -> dict[str, str]:
    """Options that a serialized model states for sessions of onnxruntime; entries that are none of ours don't count."""
    stated = dict(_metadata(memoryview(model)))
    return {name: value for name, value in INT8_OPTIONS.items() if stated.get(name) == value}


def stated_digest(model: bytes) -> str | None:
    """The digest that a serialized model states of itself; None if it states none."""
    return dict(_metadata(memoryview(model))).get(DIGEST_KEY)


def _check_digest(content: bytes) -> None:
    entry_bytes = len(_digest_entry(b""))
    if content[-entry_bytes:] != _digest_entry(memoryview(content)[:-entry_bytes]):
        raise ValueError("other content than its digest says: it was changed or damaged")


def _digest_entry(model: bytes | memoryview) -> bytes:
    """Field with the digest of what comes before it, as protobuf writes it."""
    key, value = DIGEST_KEY.encode(), hashlib.sha256(model).hexdigest().encode()
    entry = bytes([0x0A, len(key), *key, 0x12, len(value), *value])
    return bytes([_METADATA_PROPS << 3 | 2, len(entry)]) + entry


def _metadata(model: memoryview) -> Iterator[tuple[str, str]]:
    """Entries of the metadata of a serialized model."""
    for field, entry in fields(model):
        if field == _METADATA_PROPS and isinstance(entry, memoryview):
            if len(entry) > MAX_ENTRY_BYTES:
                raise ValueError(f"an entry of {len(entry)} bytes in the metadata")
            parts = dict(fields(entry))
            yield _text(parts.get(1)), _text(parts.get(2))


def _text(value: int | memoryview | None) -> str:
    return bytes(value).decode() if isinstance(value, memoryview) else ""
