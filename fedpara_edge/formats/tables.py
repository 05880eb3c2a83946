"""Bounds on the tables of files that anyone may have written, from the layout of the model that they are for."""

from __future__ import annotations

import json
from functools import lru_cache

from fedpara_edge.codecs import codec
from fedpara_edge.factors.layout import Layout

_ANY_HEADER_BYTES = 1 << 16  # 64 metrics with long names, and what a codec states, take less


@lru_cache(maxsize=8)
def max_table_bytes(layout: Layout) -> int:
    """Largest table of a file with the shared tensors of a model, in bytes.

    It leaves room for the layout itself, twice escaped, a row for each tensor, and a sum for each chunk.
    """
    sums = 16 * (layout.shared_parameters // codec.CHUNK_ENTRIES + 2)
    return _ANY_HEADER_BYTES + 4 * len(json.dumps(layout.to_json())) + sums


def max_update_bytes(layout: Layout) -> int:
    """Size of the largest update of a model, in bytes: no codec takes more than twice what float32 does."""
    return 8 * layout.shared_parameters + max_table_bytes(layout) + _ANY_HEADER_BYTES
