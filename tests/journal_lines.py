"""Fields that lines of `metrics.jsonl` need, for tests in which nothing was measured."""

from typing import Any

NEEDED: dict[str, dict[str, Any]] = {
    "arm": {"shared_parameters": None},
    "clients": {},
    "round": dict.fromkeys(("accuracy", "loss", "up_bytes", "down_bytes", "seconds", "weights_bytes", "change_bytes")),
    "done": {"rounds": None, "diverged": None},
}
"""Fields by event, all null."""
