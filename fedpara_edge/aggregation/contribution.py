"""What is kept of an update whose values were read, and its factors in the means that an algorithm asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.formats.update import Update, UpdateHeader


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """An update whose values were read.

    Args:
        header: Header of the update file.
        path: File of the update, or the partial that it is in.
        bytes: Size of its file.
        norms: Norms of the changes of trained tensors and of running statistics.
        sha256: Digest of its file, hexadecimal; None where nobody asked.
        update: The closed update; None where only a partial has it.
    """

    header: UpdateHeader
    path: Path
    bytes: int
    norms: tuple[float, float]
    sha256: str | None = None
    update: Update | None = None


def factors_of(headers: Sequence[UpdateHeader], algorithm: ServerAlgorithm) -> NDArray[np.float64]:
    """Factors of the updates in each mean besides their weights, float64 [means, updates]; those of the first are 1."""
    return algorithm.shares(np.ones(len(headers)), [header.metrics for header in headers])
