"""Entropy coding of bytes with Zstandard, the one place that imports `zstandard`.

Stored: one byte, 0 and the bytes as they are, or 1 and one Zstandard frame (RFC 8878) that states its content's size
and has neither checksum nor dictionary; whichever is shorter.

Symbols of noise have no repetitions worth a reference: looking for some costs bytes, as every false match cuts the
literals and brings its own table. The parameters leave nearly everything to the Huffman code of the literals: strategy
`fast`, matches of 7 bytes at least, and a table of 64 places for candidates.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
        InputError: it can't; the message has the line to type.
    """
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise InputError(
            "zstandard: expected it to be installed for this codec, found none; type: pip install zstandard "
            "(sudo apt install python3-zstandard on 32-bit Raspberry Pi OS)"
        ) from error


def compress(data: bytes, *, entropy: bool = True) -> bytes:
    """The stored form of some bytes; without `entropy` as they are, which is read two or three times as fast."""
    frame = _compressor().compress(data) if entropy else data
    return bytes([_FRAME]) + frame if len(frame) < len(data) else bytes([_RAW]) + data


def decompress(section: Section, size: int) -> NDArray[np.uint8]:
    """The `size` bytes in the rest of a section; nothing larger is ever allocated.

    Raises:
        DamageError: there is something else.
    """
    kind = section.byte("a kind of bytes")
    if kind == _RAW:
        return section.take(size, "symbols")
    if kind != _FRAME:
        raise DamageError(f"bytes of kind {_RAW} or {_FRAME}, found kind {kind}")
    import zstandard

    frame = section.take(section.rest, "a frame").data
    try:
        stated = zstandard.get_frame_parameters(frame)
        if stated.content_size != size or stated.dict_id:
            raise DamageError(f"a Zstandard frame of {size} bytes, found one of {stated.content_size}")
        content = _decompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamageError(f"a Zstandard frame of {size} bytes, found {str(error)[:100]}") from error
    if len(content) != size:
        raise DamageError(f"a Zstandard frame of {size} bytes, found {len(content)}")
    return np.frombuffer(content, np.uint8)


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
