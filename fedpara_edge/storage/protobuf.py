"""Messages of Protocol Buffers, the container of ONNX files, field by field and without a schema.

A message is a sequence of (key, value), the key a varint of 8 · number + type. Type 0 is a varint, 1 eight bytes, 5
four bytes, and 2 a varint length followed by that many bytes. A varint has seven bits a byte, the lowest first, and the
eighth bit of every byte but the last set. The deprecated groups, types 3 and 4, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_MAX_VARINT_BYTES, _MAX_KEY = 10, (1 << 32) - 1


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of a message in order: (number, value), an integer for a varint and the bytes for anything else.

    Raises:
        ValueError: The message is damaged, or was cut short. What comes before is yielded first.

    >>> [(number, bytes(value)) for number, value in fields(memoryview(bytes([0x0A, 2, 104, 105])))]
    [(1, b'hi')]
    >>> list(fields(memoryview(bytes([0x10, 0x96, 1]))))
    [(2, 150)]
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        if not 8 <= key <= _MAX_KEY:
            raise ValueError(f"a field with key {key}")
        kind = key & 7
        if kind == _VARINT:
            number, position = _varint(message, position)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of type {kind}")
        if length > end - position:
            raise ValueError("a message that was cut short")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Value of the varint at a position, and the position after it."""
    value = 0
    for index, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, position + index + 1
    raise ValueError("a damaged varint, or a message that was cut short")
