"""Flower's grid in this process, for tests of a fleet: devices that train, and devices that do something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedpara_edge.fleet.device import answer
from fedpara_edge.fleet.messages import Answer, Call, read_call
from fedpara_edge.fleet.settings import NodeConfig

EXPORT = "export mlp --classes 3 --input-shape 1,4,4 --gamma 0.5 --batch-size 8 -o bundle"
"""Command that makes the bundle of a fleet."""
Device = Callable[[Call], RecordDict | Error | None]
"""What a device answers to a call; None for nothing yet."""


class Grid:
    """A grid whose devices answer when their replies are pulled.

    Attributes:
        devices: Devices that are there, by number.
        calls: Calls that were pushed, with the device.
        most_open: Most calls that were open at a time.
        most_held: Most replies that were given at a time.
    """

    def __init__(self, devices: dict[int, Device]) -> None:
        self.devices = devices
        self.calls: list[tuple[int, Call]] = []
        self.most_open = self.most_held = 0
        self._open: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.devices)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        numbers: list[str | None] = []
        for message in messages:
            if message.metadata.dst_node_id not in self.devices:
                numbers.append(None)
                continue
            number = f"m{len(self.calls)}"
            message.metadata.__dict__["_message_id"] = number
            self.calls.append((message.metadata.dst_node_id, read_call(message.content)))
            self._open[number] = message
            numbers.append(number)
        self.most_open = max(self.most_open, len(self._open))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for number in message_ids:
            message = self._open[number]
            device = self.devices.get(message.metadata.dst_node_id, gone)
            said = device(read_call(message.content))
            if said is not None:
                del self._open[number]
                replies.append(Message(said, reply_to=message))
        self.most_held = max(self.most_held, len(replies))
        return replies


def gone(call: Call) -> Error:  # noqa: ARG001
    """What Flower says for a node that no longer tells that it lives."""
    return Error(code=5, reason="Node Unavailable")


def crashed(call: Call) -> Error:  # noqa: ARG001
    return Error(code=2, reason="<class 'RuntimeError'>:<'disk'>")


def silent(call: Call) -> None:  # noqa: ARG001
    return None


def garbage(call: Call) -> RecordDict:  # noqa: ARG001
    return Answer(files={"update": b"no update at all"}).content()


def of_another_app(call: Call) -> RecordDict:  # noqa: ARG001
    return RecordDict({"metrics": ConfigRecord({"loss": 0.5})})


def trains(state: Path, data: Path, **more: Any) -> Device:
    """A device that does as it is told."""
    node = NodeConfig(state=state, data=data, threads=1, **more)
    return lambda call: answer(call, node).content()


def replays(device: Device) -> Device:
    """A device that sends what it sent in its first round, again and again."""
    kept: list[Any] = []

    def say(call: Call) -> Any:
        if not kept:
            kept.append(device(call))
        return kept[0]

    return say
