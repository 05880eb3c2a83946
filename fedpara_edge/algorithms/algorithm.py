"""What the client's and the server's half of an algorithm have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from fedpara_edge.options import check


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One half of a federated optimizer. Its fields are its options (`fedpara_edge.options`).

    Attributes:
        name: Name that a user types and that files state.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check(self)

    def options(self) -> dict[str, Any]:
        """The options by name, plain data for `json.dumps`."""
        return asdict(self)

    def to_json(self) -> dict[str, Any]:
        """Name and options, plain data for `json.dumps`."""
        return {"name": self.name, **self.options()}
