"""Blocks: groups of consecutive entries that share a scale.

With a block size, each tensor is cut into blocks of that many entries, starting afresh in every chunk of the flat
change, so that a block lies within one tensor and one chunk, and the last block of a piece may be shorter. With block
size 0, each chunk is one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import codec
from fedpara_edge.codecs.codec import chunks
from fedpara_edge.factors.layout import TensorSpec


def cut(tensors: Sequence[TensorSpec], block: int) -> tuple[NDArray[np.intp], ...]:
    """Lengths of the blocks of every chunk, in entries.

    Args:
        tensors: Shared tensors, in the order of the flat change.
        block: Block size in entries; 0 for one block per chunk.

    >>> weight = TensorSpec(name="w", shape=(3, 1), dtype="float32", layer="", part="weight", role="shared")
    >>> bias = TensorSpec(name="b", shape=(3,), dtype="float32", layer="", part="bias", role="shared")
    >>> cut([bias, weight], 2)
    (array([2, 1, 2, 1]),)
    """
    return _cut(tuple(tensor.size for tensor in tensors), block, codec.CHUNK_ENTRIES)


@lru_cache(maxsize=64)
def _cut(sizes: tuple[int, ...], block: int, _: int) -> tuple[NDArray[np.intp], ...]:
    # Cached because all updates of a round are cut the same way; the chunk size is part of the key.
    ends = np.cumsum(np.array(sizes, np.intp))
    found = []
    for start, stop in chunks(int(ends[-1]) if sizes else 0):
        inner = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "left")]
        pieces = np.diff(np.r_[start, inner, stop]) if block else np.array([stop - start])
        full, last = np.divmod(pieces, block or stop - start)
        # Each piece yields its full blocks and, if entries are left over, one shorter block.
        lengths = np.stack([np.full_like(full, block or stop - start), last], 1).reshape(-1)
        counts = np.stack([full, (last > 0).astype(np.intp)], 1).reshape(-1)
        lengths = np.repeat(lengths, counts)
        lengths.flags.writeable = False
        found.append(lengths)
    return tuple(found)
