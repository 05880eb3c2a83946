"""Entropy coding of bytes with Zstandard; the only module that imports `zstandard`.

Stored: a byte 0 and the bytes as they are, or a byte 1 and one Zstandard frame (RFC 8878) that states its content's
size and has neither checksum nor dictionary; whichever is shorter.

Noisy symbols have no repetitions worth a reference: looking for some costs bytes, as every false match cuts the
literals and brings a table of its own. The parameters leave nearly everything to the Huffman code of the literals:
strategy `fast`, matches of at least 7 bytes, and a table of 64 candidate positions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.scratch import scratch
from fedpara_edge.codecs.section import DamageError, Section
from fedpara_edge.errors import InputError

if TYPE_CHECKING:
    import zstandard

_RAW, _FRAME = 0, 1
_WINDOW_LOG = 17
_threads = threading.local()  # a context serves one thread at a time


def require_zstandard() -> None:
    """Raise unless `zstandard` can be imported.

    Raises:
        InputError: The package is missing; the message has the command that installs it.
    """
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise InputError(
            "zstandard: expected the package that this codec needs, found none; run: pip install zstandard "
            "(sudo apt install python3-zstandard on 32-bit Raspberry Pi OS)"
        ) from error


def compress(data: bytes, *, entropy: bool = True) -> bytes:
    """Stored form of some bytes; without `entropy` as they are, which is read two or three times as fast."""
    frame = _compressor().compress(data) if entropy else data
    return bytes([_FRAME]) + frame if len(frame) < len(data) else bytes([_RAW]) + data


def decompress(section: Section, size: int) -> NDArray[np.uint8]:
    """Content of `size` bytes from the rest of a section; nothing larger is ever allocated.

    Raises:
        DamageError: The section holds something else.
    """
    stored, framed = _open(section, size)
    return np.frombuffer(_content(stored, size) if framed else stored, np.uint8)


def decompress_all(sections: Sequence[Section], size: int) -> NDArray[np.uint8]:
    """Contents of several sections, as `decompress` returns each, uint8 [sections, size]; of a `scratch`.

    Where `zstandard` can (with its C backend, the one for CPython), all frames are decoded in one call, so that the
    threads of an aggregation need not wait for each other after every frame.

    Raises:
        DamageError: A section holds something else.
    """
    opened = [_open(section, size) for section in sections]
    contents = iter(_contents([stored for stored, framed in opened if framed], size))
    joined = scratch("symbols", (len(sections), size))
    for row, (stored, framed) in zip(joined, opened, strict=True):
        row[:] = np.frombuffer(next(contents) if framed else stored, np.uint8)
    return joined


def _open(section: Section, size: int) -> tuple[memoryview, bool]:
    """Stored bytes, and whether they are a frame, whose header then states `size`."""
    kind = section.byte("a kind of bytes")
    if kind == _RAW:
        return section.take(size, "symbols").data, False
    if kind != _FRAME:
        raise DamageError(f"bytes of kind {_RAW} or {_FRAME}, found kind {kind}")
    import zstandard

    frame = section.take(section.rest, "a frame").data
    try:
        stated = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise _damage(size, error) from error
    if stated.content_size != size or stated.dict_id or stated.has_checksum:
        raise _damage(size, f"one of {stated.content_size}")
    return frame, True


def _content(frame: memoryview, size: int) -> bytes:
    import zstandard

    try:
        content = _decompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _damage(size, error) from error
    if len(content) != size:
        raise _damage(size, len(content))
    return content


def _contents(frames: Sequence[memoryview], size: int) -> Iterable[bytes]:
    import zstandard

    if len(frames) < 2 or "multi_decompress_to_buffer" not in zstandard.backend_features:
        return [_content(frame, size) for frame in frames]
    for frame in frames:
        length = _frame_bytes(frame)
        if length != len(frame):  # surplus bytes, which would be ignored, or missing ones
            raise _damage(size, f"{len(frame) - length} bytes behind it")
    sizes = np.full(len(frames), size, np.uint64).data
    try:
        found = _decompressor().multi_decompress_to_buffer(list(frames), decompressed_sizes=sizes)
    except zstandard.ZstdError as error:
        raise _damage(size, error) from error
    return cast(
        "Iterable[bytes]", (found[number] for number in range(len(frames)))
    )  # the segments have the buffer protocol


def _frame_bytes(frame: memoryview) -> int:
    """Length of a frame without a checksum, from the headers of its blocks (RFC 8878, section 3.1.1.2)."""
    import zstandard

    position, last = zstandard.frame_header_size(frame), False
    while not last and position < len(frame):
        header = int.from_bytes(frame[position : position + 3], "little")
        last = bool(header & 1)
        repeated = (header >> 1) & 3 == 1  # RLE: a single byte, repeated as often as the size says
        position += 3 + (1 if repeated else header >> 3)
    return position


def _damage(size: int, found: object) -> DamageError:
    return DamageError(f"a Zstandard frame of {size} bytes, found {str(found)[:100]}")


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_threads, "compressor"):
        import zstandard

        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            min_match=7,
            window_log=_WINDOW_LOG,
            hash_log=6,
            chain_log=6,
            search_log=1,
            target_length=0,  # with more, this strategy leaves literals uncompressed
            write_content_size=True,
            write_checksum=False,
        )
        _threads.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    compressor: zstandard.ZstdCompressor = _threads.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_threads, "decompressor"):
        import zstandard

        _threads.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
    decompressor: zstandard.ZstdDecompressor = _threads.decompressor
    return decompressor
