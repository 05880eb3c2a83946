"""The folded model: an ONNX file that any ONNX runtime runs, and that describes itself.

It takes the bundle's raw input and gives its outputs [B, ...] in float32, with every weight composed. One entry of its
`metadata_props` is ours: its key is `fedpara_edge`, its value canonical JSON (sorted keys, no spaces, UTF-8):

    format        fedpara-edge/folded
    version       1
    model         name given at export
    fingerprint   hexadecimal; of the bundle from which it was folded
    round         of its weights
    precision     float32, float16 or int8: the type in which its weights are stored
    personal      whether it contains a device's own personal tensors
    input, label, output, loss
                  as in the bundle's manifest

The entry is read here without onnx or onnxruntime. An ONNX file is a protobuf message (`storage.protobuf`). Field 14 of
an ONNX model, type 2, is an entry of `metadata_props`: a message with the key as field 1 and the value as field 2, both
of type 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import ArraySpec, Loss
from fedpara_edge.formats.graphfile import check_graph, read_content
from fedpara_edge.storage.protobuf import fields
from fedpara_edge.storage.tensortable import strict_json

FORMAT = "fedpara-edge/folded"
METADATA_KEY = "fedpara_edge"
MAX_ENTRY_BYTES = 1 << 20

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
    input: ArraySpec
    label: ArraySpec
    output: ArraySpec
    loss: Loss

    def to_json(self) -> str:
        """Value of the entry `fedpara_edge`."""
        return json.dumps({"format": FORMAT, "version": 1, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> FoldedSpec:
        """Inverse of `to_json`.

        Raises:
            ValueError: The text is not JSON, has another format or version, or a field is missing or unknown.
        """
        data = strict_json(text)
        if not isinstance(data, dict) or (data.pop("format", None), data.pop("version", None)) != (FORMAT, 1):
            raise ValueError(f"another format than {FORMAT} version 1")
        try:
            arrays = {name: _array_spec(data[name]) for name in ("input", "label", "output")}
            spec = FoldedSpec(**{**data, **arrays})
        except (KeyError, TypeError) as error:
            raise ValueError(f"other fields ({error})") from error
        known = spec.precision in get_args(Precision) and spec.loss in get_args(Loss)
        if not known or type(spec.round) is not int or type(spec.personal) is not bool:
            raise ValueError("fields with other values")
        return spec


def _array_spec(data: Any) -> ArraySpec:
    spec = ArraySpec(**{**data, "shape": tuple(data["shape"])})
    if spec.dtype not in _DTYPES or not all(type(size) is int and size > 0 for size in spec.shape):
        raise ValueError(f"an array of {spec.dtype} {list(spec.shape)}")
    return spec


_DTYPES = ("uint8", "float32", "int64")


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
        spec = FoldedSpec.from_json(entries[METADATA_KEY])
        check_graph(content)
        return spec, content
    except OSError as error:
        raise InputError(f"{path}: expected a folded model, found {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected a folded model, found {error}; {remedy}") from error


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
