"""Calls out and answers in, over Flower's grid, in windows, so that memory does not grow with the number of devices.

Flower's own `send_and_receive` makes all messages of a round at once and holds all replies until the last one is there.
Here a call is made when it is pushed, as long as not too many are open, and answers are taken `HELD` at a time: each is
given away, to be written to a file, before the next ones are asked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Message

from fedpara_edge.errors import FedparaError, InvalidUpdateError, brief_text
from fedpara_edge.fleet.bells import bells_here
from fedpara_edge.fleet.messages import Answer, Call, read_answer
from fedpara_edge.simulation.plan.devices import GONE, LATE

if TYPE_CHECKING:
    from flwr.serverapp import Grid

HELD = 8
"""Most answers that are in memory at a time."""
POLL_SECONDS = 0.2
"""Time in which answers of nodes elsewhere are looked for."""
LATE_SECONDS = 1.0
"""Time in which answers are looked for that a bell tells of."""
ERRORS = {
    1: "client_app_failed",
    2: "client_app_failed",
    3: GONE,
    4: GONE,
    5: GONE,
    7: "client_app_failed",
    8: GONE,
}
"""Codes by those of Flower's errors; 8 is a client app that was killed."""


@dataclass(frozen=True)
class Failure:
    """A device that gave no answer.

    Args:
        code: Reason, in one word.
        message: Reason, in one line.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Reply:
    """What came of a call.

    Args:
        node: Flower's number of the device.
        round: Round of the call.
        found: Answer of the device.
    """

    node: int
    round: int
    found: Answer | Failure


class Exchange:
    """Calls to devices, and their answers as they come.

    Args:
        grid: Flower's grid.
        at_once: Calls that may be open at a time.
    """

    def __init__(self, grid: Grid, *, at_once: int) -> None:
        self._grid, self._at_once, self._bells = grid, at_once, bells_here()
        self._waiting: deque[tuple[int, int, Callable[[], Call]]] = deque()
        self._open: dict[str, tuple[int, int]] = {}
        self._late: dict[str, tuple[int, int]] = {}

    @property
    def busy(self) -> set[int]:
        """Devices that still owe an answer of an earlier round."""
        return {node for node, _ in self._late.values()}

    def ask(self, node: int, round: int, make: Callable[[], Call]) -> None:
        """Call a device when there is room in the window; the call is made only then."""
        self._waiting.append((node, round, make))

    def replies(self, deadline: float) -> Iterator[Reply]:
        """The answers, late ones of earlier rounds among them, until all are there or the time is over.

        Args:
            deadline: End of the time, on the monotonic clock.
        """
        while self._waiting or self._open:
            if time.monotonic() > deadline:
                yield from self._give_up()
                return
            while self._waiting and len(self._open) < self._at_once:
                if (failed := self._call(*self._waiting.popleft())) is not None:
                    yield failed
            count = len(self._open) + len(self._late)
            yield from self._pull()
            if len(self._open) + len(self._late) == count:
                self._bells.server.wait(POLL_SECONDS if self._bells.others else LATE_SECONDS)

    def _pull(self) -> Iterator[Reply]:
        """The answers that are there."""
        numbers = [*self._open, *self._late]
        for start in range(0, len(numbers), HELD):
            messages = list(self._grid.pull_messages(numbers[start : start + HELD]))
            while messages:
                message = messages.pop()
                number = message.metadata.reply_to_message_id
                node, round = (self._open if number in self._open else self._late).pop(number)
                yield Reply(node, round, _found(message))

    def _call(self, node: int, round: int, make: Callable[[], Call]) -> Reply | None:
        """Push a call; a failure if Flower doesn't take it."""
        call = Message(make().content(), dst_node_id=node, message_type="train", group_id=str(round + 1))
        numbers = [number for number in self._grid.push_messages([call]) if number]
        if not numbers:
            return Reply(node, round, Failure(GONE, "expected a device that is connected, found it gone"))
        self._open[numbers[0]] = node, round
        self._bells.ring_node(node)
        return None

    def _give_up(self) -> Iterator[Reply]:
        message = "expected an answer in time (round-seconds), found none"
        for node, round, _ in self._waiting:
            yield Reply(node, round, Failure(LATE, message))
        for node, round in self._open.values():
            yield Reply(node, round, Failure(LATE, message))
        self._late |= self._open
        self._open.clear()
        self._waiting.clear()


def _found(message: Message) -> Answer | Failure:
    if message.has_error():
        error = message.error
        return Failure(ERRORS.get(error.code, f"flower_{error.code}"), brief_text(error.reason, max_length=300))
    try:
        return read_answer(message.content)
    except InvalidUpdateError as error:
        return Failure(FedparaError.code if error.code is None else error.code, str(error))
