"""Which devices are asked to train in a round, and why the others are not."""

from __future__ import annotations

ALIVE_SECONDS = 120.0
"""Time after its last request for which a device may be drawn for a round."""
