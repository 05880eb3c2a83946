"""The refusal of a request, with the status of HTTP that tells the device what to do."""

from __future__ import annotations

from fedpara_edge.aggregation.screening import Rejected
from fedpara_edge.errors import FedparaError


class RefusedError(FedparaError):
    """A request that is not granted.

    Args:
        message: Expectation, finding and remedy, in one line, which the device or its user reads.
        status: Status of HTTP: 409 and below 500 for good, 429 and 503 to try again.
        code: Reason in one word.
    """

    def __init__(self, message: str, *, status: int, code: str = "refused") -> None:
        super().__init__(message, code=code)
        self.status = status


def without_path(rejected: Rejected) -> str:
    """The reason of a refusal without the file and the client, of which the file on the server says nothing."""
    reason = rejected.reason.replace(f"{rejected.path}: ", "").replace(str(rejected.path), "update")
    return reason.replace(f"client {rejected.client!r}: ", "")
