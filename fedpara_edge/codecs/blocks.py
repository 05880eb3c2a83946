"""Blocks: the entries that share a scale.

With a block size, each tensor is cut into blocks of that many entries, starting again with every chunk of the flat
change, so that a block lies in one tensor and in one chunk and the last one of a piece is shorter. Without one (0), a
chunk is one block.
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
    """The lengths of the blocks of every chunk.

    Args:
        tensors: the shared tensors, sorted by name.
        block: entries of a block; 0 to take each chunk as one.

    >>> weight = TensorSpec(name="w", shape=(3, 1), dtype="float32", layer="", part="weight", role="shared")
    >>> bias = TensorSpec(name="b", shape=(3,), dtype="float32", layer="", part="bias", role="shared")
    >>> cut([bias, weight], 2)
    (array([2, 1, 2, 1]),)
    """
    return _cut(tuple(tensor.size for tensor in tensors), block, codec.CHUNK_ENTRIES)


@lru_cache(maxsize=64)
def _cut(sizes: tuple[int, ...], block: int, _: int) -> tuple[NDArray[np.intp], ...]:
    # Cached, as the updates of a round are cut alike; the size of a chunk is part of the key.
    ends = np.cumsum(np.array(sizes, np.intp))
    found = []
    for start, stop in chunks(int(ends[-1]) if sizes else 0):
        inner = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "left")]
        pieces = np.diff(np.r_[start, inner, stop]) if block else np.array([stop - start])
        full, last = np.divmod(pieces, block or stop - start)
        # Every piece gives its full blocks and, unless it is 0 long, one shorter block.
        lengths = np.stack([np.full_like(full, block or stop - start), last], 1).reshape(-1)
        counts = np.stack([full, (last > 0).astype(np.intp)], 1).reshape(-1)
        lengths = np.repeat(lengths, counts)
        lengths.flags.writeable = False
        found.append(lengths)
    return tuple(found)
