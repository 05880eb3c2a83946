"""How an aggregation divides its work: `Effort`.

Neither the number of threads nor the pieces of a step change a bit of the result. The size of a block changes the last
ones, within the accuracy that `stream` states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Files, threads and entries at work at a time.

    Args:
        block_files: Number of update files that are open at a time.
        threads: Number of threads that decode and add up.
        piece_entries: Number of entries of the model in a piece of the server's step.
    """

    block_files: int = 20
    threads: int = 2
    piece_entries: int = 1 << 18

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results of a function for each item, in order, found by all threads."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(function, items))


USUAL = Effort()
"""The effort of a server: the chunks of a block fit into its cache, and two cores are busy."""
