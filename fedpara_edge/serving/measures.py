"""What the server counts, as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

import threading
from collections.abc import Mapping

_HELP = {
    "requests_total": ("counter", "Requests by status."),
    "received_bytes_total": ("counter", "Bytes of updates that arrived, refused ones included."),
    "updates_total": ("counter", "Updates by outcome: taken, again for one that was there, refused."),
    "round": ("gauge", "Rounds behind the weights from which devices train."),
    "round_updates": ("gauge", "Updates taken in the round that is open."),
    "round_asked": ("gauge", "Devices asked to train in it."),
    "devices": ("gauge", "Devices that joined."),
    "devices_alive": ("gauge", "Devices that were here in the last two minutes."),
    "paused": ("gauge", "1 if no device is asked to train, else 0."),
    "accuracy": ("gauge", "Accuracy of the newest weights that were evaluated."),
    "loss": ("gauge", "Loss of the newest weights that were evaluated."),
    "failed": ("gauge", "1 if an error keeps the round from being aggregated, else 0."),
}


class Measures:
    """Counters, which begin at 0 with the process."""

    def __init__(self) -> None:
        self._counting = threading.Lock()
        self._counters: dict[tuple[str, str], float] = {}

    def count(self, name: str, label: str = "", *, by: float = 1) -> None:
        """Add to a counter.

        Args:
            name: Name of the counter.
            label: Label with its value, such as `status="200"`.
            by: Number to add.
        """
        with self._counting:
            self._counters[name, label] = self._counters.get((name, label), 0) + by

    def text(self, gauges: Mapping[str, float]) -> str:
        """The counters, and values of the moment by name.

        >>> measures = Measures()
        >>> measures.count("requests_total", 'status="200"')
        >>> print(measures.text({"round": 3}).split("fedpara_edge_requests_total")[-1].strip())
        {status="200"} 1
        # HELP fedpara_edge_round Rounds behind the weights from which devices train.
        # TYPE fedpara_edge_round gauge
        fedpara_edge_round 3
        """
        with self._counting:
            found = {**self._counters, **{(name, ""): value for name, value in gauges.items()}}
        lines = []
        for name, (kind, help_) in _HELP.items():
            values = {label: value for (counter, label), value in sorted(found.items()) if counter == name}
            if values:
                lines += [f"# HELP fedpara_edge_{name} {help_}", f"# TYPE fedpara_edge_{name} {kind}"]
                lines += [
                    f"fedpara_edge_{name}{f'{{{label}}}' if label else ''} {value:.15g}"
                    for label, value in values.items()
                ]
        return "\n".join(lines) + "\n"
