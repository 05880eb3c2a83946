"""Integers that are mostly zero or small, stored in nearly as few bits as their entropy.

n signed integers v, |v| <= 2^20, are stored as

    low         1 byte: number r <= 15 of low bits that are stored as they are
    nonzero     bit vector of n: v != 0; let m of its bits be set
    signs       m bits: v < 0
    level 1 …   with a = (|v| - 1) >> r for the m nonzero integers: bit vector over those still in: a >= level; those
                whose bit is set stay in
    excess      of those still in after level 32, in order: a - 32 as uint32, little-endian
    low bits    of |v| - 1 of the m: r times m bits, the least significant first

The levels end with the first in which no bit is set; with m = 0 there are none. Bits fill each byte from the least
significant one on, and every item above, and every m of the low bits, begins with a new byte. A bit vector of n bits is
one byte for its kind, followed by what that kind needs:

    0           nothing: no bit is set
    1           the n bits
    16 + k      the gaps before its set bits, with k from 0 to 15: their number (1 to 3 bytes with 7 bits each, the
                least significant first, bit 7 set in all but the last), the k low bits of the gaps as above, and for
                each gap as many zeros as gap >> k, then a one
    32 + k      the same for its clear bits

A gap is the number of bits between one such bit and the next, or before the first. This is Golomb's code with Rice's
parameter. For independent bits it takes at most some 3 % more than the entropy, with no table to send. For an update of
the zoo's cnn, at 1 bit down to 0.2 bits per entry, it takes 3 to 36 % less than Zstandard's Huffman code of the same
bits, so near the entropy that an arithmetic coder has little left to save. The levels, each coded given the one before,
add up to the entropy of the integers by the chain rule.

Source: Golomb, Run-length encodings (1966); Rice and Plaunt (1971).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.section import DamageError, Section

LARGEST = 1 << 20
_LEVELS = 32
_MAX_LOW_BITS = 15
_NONE, _RAW, _SET, _CLEAR = 0, 1, 16, 32


def encode_sparse(integers: NDArray[np.int32]) -> bytes:
    """Stored form of integers, int32 [n], whose magnitudes are at most `LARGEST`."""
    nonzero = integers != 0
    values = integers[nonzero]
    above = np.abs(values) - 1
    low = _low_bits(above)
    parts = [bytes([low]), _encode_bits(nonzero), np.packbits(values < 0, bitorder="little").tobytes()]
    left = above >> low
    level = 1
    while left.size and level <= _LEVELS:
        stays = left >= level
        parts.append(_encode_bits(stays))
        left = left[stays]
        level += 1
    parts += [(left - _LEVELS).astype("<u4").tobytes(), _pack_low(above, low)]
    return b"".join(parts)


def decode_sparse(section: Section, count: int) -> tuple[NDArray[np.integer], NDArray[np.int32]]:
    """Those of `count` stored integers that are not zero: their positions, ascending, and their values.

    Raises:
        DamageError: The bytes are not what `encode_sparse` wrote.
    """
    low = section.byte("a number of low bits")
    if low > _MAX_LOW_BITS:
        raise DamageError(f"at most {_MAX_LOW_BITS} low bits, found {low}")
    positions = _decode_bits(section, count)
    negative = _take_bits(section, len(positions), "signs").view(bool)
    magnitudes = np.ones(len(positions), np.int32)
    left = np.arange(len(positions))
    level = 1
    while left.size and level <= _LEVELS:
        left = left[_decode_bits(section, len(left))]
        magnitudes[left] += 1
        level += 1
    if left.size:
        excess = section.take(4 * len(left), "excess").view("<u4")
        magnitudes[left] += np.minimum(excess, LARGEST).astype(np.int32)
    if low:
        whole = ((magnitudes.astype(np.int64) - 1) << low) + _take_low(section, len(positions), low) + 1
        magnitudes = np.minimum(whole, LARGEST + 1).astype(np.int32)
    if magnitudes.max(initial=0) > LARGEST:
        raise DamageError(f"integers up to {LARGEST}, found one above")
    np.negative(magnitudes, out=magnitudes, where=negative)
    return positions, magnitudes


def _low_bits(above: NDArray[np.int32]) -> int:
    # Keeps the levels few where nearly all integers are large; 0 for most changes.
    mean = float(above.mean()) if above.size else 0.0
    return min(max(int(np.log2(max(mean, 1.0))) - 1, 0), _MAX_LOW_BITS)


def _encode_bits(bits: NDArray[np.bool_]) -> bytes:
    count = int(np.count_nonzero(bits))
    if not count:
        return bytes([_NONE])
    kind = _SET if 2 * count <= len(bits) else _CLEAR
    gaps = np.diff(np.flatnonzero(bits if kind == _SET else ~bits), prepend=-1) - 1
    # The best parameter of a geometric distribution, or one beside it.
    guess = int(np.log2(max(0.69 * gaps.mean(), 1))) if gaps.size else 0
    sizes = {k: int(np.sum(gaps >> k)) + len(gaps) * (1 + k) for k in (guess, min(guess + 1, _MAX_LOW_BITS))}
    low = min(sizes, key=sizes.__getitem__)
    if sizes[low] + 8 >= len(bits):
        return bytes([_RAW]) + np.packbits(bits, bitorder="little").tobytes()
    ends = np.cumsum((gaps >> low) + 1)
    unary = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    unary[ends - 1] = 1
    parts = [bytes([kind + low]), _encode_count(len(gaps)), _pack_low(gaps, low)]
    return b"".join([*parts, np.packbits(unary, bitorder="little").tobytes()])


def _decode_bits(section: Section, count: int) -> NDArray[np.integer]:
    """Positions of the set bits in a bit vector of `count` bits."""
    kind = section.byte("a kind of bit vector")
    if kind == _NONE:
        return np.empty(0, np.intp)
    if kind == _RAW:
        return np.flatnonzero(_take_bits(section, count, "bits").view(bool))
    if not _SET <= kind < 2 * _CLEAR - _SET:
        raise DamageError(
            f"a bit vector of kind {_NONE}, {_RAW} or {_SET} to {2 * _CLEAR - _SET - 1}, found kind {kind}"
        )
    number, low = _decode_count(section), kind % _SET
    if number > count:
        raise DamageError(f"at most {count} gaps, found {number}")
    below = _take_low(section, number, low)
    window = section.peek(-(-((count >> low) + number) // 8))
    ends = np.flatnonzero(np.unpackbits(window, bitorder="little").view(bool))[:number]
    if len(ends) < number:
        raise DamageError(f"{number} gaps, found {len(ends)}")
    section.take(-(-(int(ends[-1]) + 1) // 8) if number else 0, "gaps")
    gaps = ((np.diff(ends, prepend=-1).astype(np.int64) - 1) << low) + below
    positions = np.cumsum(gaps + 1) - 1
    if number and positions[-1] >= count:
        raise DamageError(f"bits among {count}, found number {positions[-1]}")
    if kind < _CLEAR:
        return positions
    bits = np.ones(count, bool)
    bits[positions] = False
    return np.flatnonzero(bits)


def _encode_count(count: int) -> bytes:
    parts = []
    while count > 127:
        parts.append(128 | (count & 127))
        count >>= 7
    return bytes([*parts, count])


def _decode_count(section: Section) -> int:
    count = 0
    for place in range(3):
        byte = section.byte("a number of gaps")
        count |= (byte & 127) << (7 * place)
        if byte < 128:
            return count
    raise DamageError("a number of gaps of 3 bytes, found a longer one")


def _pack_low(values: NDArray[np.integer], low: int) -> bytes:
    if not low:
        return b""
    bits = ((values >> place).astype(np.uint8) & np.uint8(1) for place in range(low))
    return b"".join(np.packbits(plane, bitorder="little").tobytes() for plane in bits)


def _take_low(section: Section, count: int, low: int) -> NDArray[np.uint16]:
    values = np.zeros(count, np.uint16)
    for place in range(low):
        plane = _take_bits(section, count, "low bits")
        values |= plane.astype(np.uint16) << np.uint16(place) if place else plane
    return values


def _take_bits(section: Section, count: int, what: str) -> NDArray[np.uint8]:
    return np.unpackbits(section.take(-(-count // 8), what), count=count, bitorder="little")
