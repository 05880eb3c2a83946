"""Rates: how many requests somebody may make."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from fedpara_edge.serving.refused import RefusedError

_MOST_KNOWN = 20_000


class Rates:
    """A bucket of requests for everybody, which fills up evenly and holds those of one minute (token bucket).

    Args:
        per_minute: Requests in a minute.
        clock: Function that tells the time in seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, who: str) -> None:
        """Count a request.

        Raises:
            RefusedError: There were too many.
        """
        now = self._clock()
        left, since = self._buckets.pop(who, (float(self._per_minute), now))
        left = min(left + (now - since) * self._per_minute / 60, self._per_minute)
        self._buckets[who] = max(left - 1, 0.0), now
        if len(self._buckets) > _MOST_KNOWN:
            self._buckets.popitem(last=False)
        if left < 1:
            raise RefusedError(
                f"expected at most {self._per_minute} requests in a minute, found more; wait", status=429
            )
