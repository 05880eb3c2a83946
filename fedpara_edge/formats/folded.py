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

The entry is read here without onnx or onnxruntime, and without reading the weights. An ONNX file is a protobuf message:
a sequence of (key, value), the key a varint of 8 · field + type. Type 0 is a varint, 1 eight bytes, 5 four bytes, and 2
a varint length followed by that many bytes. Field 14 of an ONNX model, type 2, is an entry of `metadata_props`: a
message with the key as field 1 and the value as field 2, both of type 2.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import ArraySpec, Loss
from fedpara_edge.storage.tensortable import strict_json

FORMAT = "fedpara-edge/folded"
METADATA_KEY = "fedpara_edge"
MAX_ENTRY_BYTES = 1 << 20

Precision = Literal["float32", "float16", "int8"]

_METADATA_PROPS = 14
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


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


def read_folded(path: Path) -> FoldedSpec:
    """Read the description of a folded model.

    Raises:
        InputError: There is no file at `path`, or it is not an ONNX model that `fedpara-edge fold` wrote.
    """
    remedy = "use a model written by fedpara-edge fold"
    try:
        with path.open("rb") as file:
            entries = dict(_metadata(file, path.stat().st_size))
        if METADATA_KEY not in entries:
            raise ValueError(f"no entry {METADATA_KEY!r} in the metadata")
        return FoldedSpec.from_json(entries[METADATA_KEY])
    except OSError as error:
        raise InputError(f"{path}: expected a folded model, found {error.strerror}; {remedy}") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: expected a folded model, found {error or 'a damaged file'}; {remedy}") from error


def _metadata(file: IO[bytes], size: int) -> Iterator[tuple[str, str]]:
    for field, start, length in _fields(file, size):
        if field == _METADATA_PROPS:
            if length > MAX_ENTRY_BYTES:
                raise ValueError(f"an entry of {length} bytes in the metadata")
            file.seek(start)
            entry = file.read(length)
            stream = io.BytesIO(entry)
            parts = {part: entry[at : at + count] for part, at, count in _fields(stream, length)}
            yield parts.get(1, b"").decode(), parts.get(2, b"").decode()


def _fields(file: IO[bytes], size: int) -> Iterator[tuple[int, int, int]]:
    """Fields of a message that ends at `size`: (number, first byte of the value, its length)."""
    position = 0
    while position < size:
        file.seek(position)
        key = _varint(file)
        kind = key & 7
        if kind == _VARINT:
            start = file.tell()
            _varint(file)
            length = file.tell() - start
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            start, length = file.tell(), 8 if kind == _EIGHT_BYTES else 4
        elif kind == _BYTES:
            length = _varint(file)
            start = file.tell()
        else:
            raise ValueError("no ONNX file")
        position = start + length
        if position > size:
            raise ValueError("no ONNX file, or one that was cut short")
        yield key >> 3, start, length


def _varint(file: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("no ONNX file")
