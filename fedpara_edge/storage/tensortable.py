"""The table at the start of a safetensors file, read strictly, as anyone may have written it.

A safetensors file is the length N of its table as a little-endian uint64, the table, and the data. The table is JSON:

    {"__metadata__":{text: text, ...},
     name: {"dtype": code, "shape": [integers], "data_offsets": [begin, end]}, ...}

with offsets in bytes from the start of the data. This reader is stricter than safetensors 0.8, which accepts repeated
keys (so that two readers may see two different files in one): no key comes twice, the metadata come first, as
safetensors writes them, and the tensors lie end to end up to the last byte, without holes or overlap. A table
is at most `MAX_TABLE_BYTES` long and has at most `MAX_VALUES` values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

MAX_TABLE_BYTES = 16 << 20
MAX_VALUES = 1 << 18
"""Bound on the values in a JSON text, each of which may take a hundred times its bytes once it is parsed."""
MAX_DIMENSIONS = 32
DTYPES = {
    "F32": "float32",
    "F64": "float64",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_ITEM_BYTES = {code: np.dtype(name).itemsize for code, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Place of one tensor in a file.

    Args:
        dtype: Name of the numpy dtype.
        shape: Shape of the tensor.
        offset: First byte, counted from the start of the file.
        nbytes: Number of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TableError(Exception):
    """Bytes that are not a table as it must be.

    Args:
        message: Finding.
        code: `truncated` if the file ends too early, `wrong_format` if it is not one of ours, else `not_safetensors`.
    """

    def __init__(self, message: str, *, code: str = "not_safetensors") -> None:
        super().__init__(message)
        self.code = code


def table_bytes(head: bytes, file_bytes: int, *, limit: int = MAX_TABLE_BYTES) -> int:
    """Length N of the table, from the first 8 bytes of a file of `file_bytes`.

    Raises:
        TableError: The file has no table of that length, or one of more than `limit` bytes.

    >>> table_bytes(b"\\x10" + bytes(7), 100)
    16
    """
    if len(head) < 8:
        raise TableError(f"a file of {len(head)} bytes" if head else "an empty file", code="truncated")
    length = int.from_bytes(head, "little")
    if length > MAX_TABLE_BYTES:
        raise TableError("one that does not begin like safetensors")
    if length > limit:
        raise TableError(f"a header of {length} bytes where {limit} are enough")
    if 8 + length > file_bytes:
        raise TableError(f"a header of {length} bytes in a file of {file_bytes}", code="truncated")
    return length


def split_metadata(text: bytes) -> tuple[Mapping[str, str], str]:
    """Metadata of a table, and the table with its metadata emptied, which files of equal tensors share.

    Raises:
        TableError: The table does not begin with metadata of text, as safetensors writes it.

    >>> split_metadata(b'{"__metadata__":{"author":"me"},"a":1}')
    ({'author': 'me'}, '{"__metadata__":{},"a":1}')
    """
    try:
        table = text.decode()
        if table.startswith("{") and not table.startswith(_METADATA):
            raise TableError("a header without metadata at its start", code="wrong_format")
        _check_values(table)
        rest = table.removeprefix(_METADATA).lstrip(" \t\r\n")
        metadata, end = _DECODER.raw_decode(rest)
    except (ValueError, RecursionError) as error:
        raise TableError(f"a header that is not strict JSON ({error})") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TableError("metadata that is not text")
    return metadata, f"{_METADATA}{{}}{rest[end:]}"


def parse_entries(table: str, data_offset: int, data_bytes: int) -> Mapping[str, Entry]:
    """Places of the tensors by name, in the order of the data.

    Args:
        table: Table as `split_metadata` returned it.
        data_offset: First byte of the data in the file.
        data_bytes: Number of bytes of the data.

    Raises:
        TableError: The table does not describe exactly these data.

    >>> dict(parse_entries('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 100, 8))
    {'a': Entry(dtype='float32', shape=(2,), offset=100, nbytes=8)}
    """
    try:
        entries = strict_json(table)
    except ValueError as error:
        raise TableError(f"a header that is not strict JSON ({error})") from error
    if not isinstance(entries, dict):
        raise TableError("a header that is not a JSON object")
    entries.pop("__metadata__", None)
    found = {name: _entry(name, stated, data_offset) for name, stated in entries.items()}
    found = dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes, item[0])))
    position = 0
    for name, entry in found.items():
        begin = entry.offset - data_offset
        if begin != position:
            raise TableError(f"tensor {name!r} at byte {begin} of the data where {position} is next")
        position += entry.nbytes
    if position != data_bytes:
        code = "truncated" if position > data_bytes else "not_safetensors"
        raise TableError(f"{data_bytes} bytes of data where the header tells of {position}", code=code)
    return MappingProxyType(found)


def strict_json(text: str) -> Any:
    """Value of a JSON text without repeated keys, NaN or Infinity, and of at most some `MAX_VALUES` values.

    Raises:
        ValueError: The text is something else.
    """
    _check_values(text)
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _check_values(text: str) -> None:
    """Bound what a JSON text costs to parse, by the characters that begin a value; those in strings count as well."""
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise ValueError(f"JSON of more than {MAX_VALUES} values")


def _entry(name: str, stated: Any, data_offset: int) -> Entry:
    try:
        code, shape, (begin, end) = stated["dtype"], tuple(stated["shape"]), stated["data_offsets"]
        item_bytes = _ITEM_BYTES[code]
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"tensor {name!r} without a dtype of {', '.join(DTYPES)}, a shape and two offsets") from error
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise TableError(f"tensor {name!r} with a shape or offset that is not a natural number")
    if len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) * item_bytes >= 1 << 62:
        raise TableError(f"tensor {name!r} with an impossible shape")
    if end - begin != math.prod(shape) * item_bytes:
        raise TableError(f"tensor {name!r} of shape {list(shape)} and dtype {code} in {end - begin} bytes")
    return Entry(DTYPES[code], shape, data_offset + begin, end - begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key comes twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


_METADATA = '{"__metadata__":'
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
