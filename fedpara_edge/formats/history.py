"""Past rounds, as a server state remembers them: from which weights they started, and whose updates of them counted.

In the header of a server state, if late updates may count, the field

    history   [{"round", "base", "counted": [clients]}, …]

of the newest rounds before that of the state, by round: SHA-256 of the weights that were its base, and the clients, by
name, whose update that was trained from them has counted, in that round or later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Past:
    """A past round.

    Args:
        base: SHA-256 of the weights that its updates were trained from, hexadecimal.
        counted: Clients whose update of the round has counted.
    """

    base: str
    counted: frozenset[str]


History = Mapping[int, Past]
"""Past rounds by number."""
NO_HISTORY: History = MappingProxyType({})


def history_to_json(history: History) -> list[dict[str, Any]]:
    """The field of a header."""
    return [
        {"round": number, "base": past.base, "counted": sorted(past.counted)}
        for number, past in sorted(history.items())
    ]


def history_from_json(field: Any) -> dict[int, Past]:
    """The past rounds in the field of a header.

    Raises:
        ValueError: It is something else.
    """
    try:
        found = {each["round"]: Past(base=each["base"], counted=frozenset(each["counted"])) for each in field}
    except (TypeError, KeyError) as error:
        raise ValueError("no list of rounds") from error
    if not all(
        type(number) is int and isinstance(past.base, str) and all(isinstance(name, str) for name in past.counted)
        for number, past in found.items()
    ):
        raise ValueError("a round with fields that do not fit")
    return found
