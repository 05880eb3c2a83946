"""Bells between the processes of a fleet on one machine: who waits for another sleeps until it rings.

Flower's programs ask each other again and again whether there is something to do, and each question is a request over
HTTP that costs milliseconds of both. Where all of them are forks of one process, pipes made before tell them:

    the ServerApp        rings a SuperNode that it has a message for
    a SuperNode          rings its SuperExec when a message is here, and the ServerApp when an answer is there
    a ClientApp          rings its SuperNode at its end

A bell only makes that somebody asks at once. What nobody rings for, as devices elsewhere can't, is noticed when the
time is over for which a wait lasts at most.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from contextlib import suppress
from dataclasses import dataclass

_NODE = struct.Struct("<Q")


class Bell:
    """A pipe that wakes one process, for forks that are made later; it rings until somebody has waited."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        for end in (self._out, self._in):
            os.set_blocking(end, False)

    def ring(self) -> None:
        """Wake who waits, or who waits next."""
        with suppress(BlockingIOError):  # full of rings that nobody heard yet
            os.write(self._in, b"!")

    def wait(self, seconds: float) -> None:
        """Sleep until it rings or the time is over."""
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if poll.poll(seconds * 1000):
            with suppress(BlockingIOError):
                os.read(self._out, 65536)

    def __del__(self) -> None:
        os.close(self._in)
        os.close(self._out)


class Bells:
    """The bells of a fleet.

    Args:
        nodes: Number of SuperNodes on this machine.
        others: Whether there may be nodes elsewhere, which can't ring.
    """

    def __init__(self, nodes: int, *, others: bool) -> None:
        self.server = Bell()
        self.nodes = [Bell() for _ in range(nodes)]
        self.tasks = [Bell() for _ in range(nodes)]
        self.others = others
        self._numbers = mmap.mmap(-1, max(1, nodes) * _NODE.size)  # which forks share

    def is_node(self, place: int, number: int) -> None:
        """Note Flower's number of the SuperNode in a place."""
        _NODE.pack_into(self._numbers, place * _NODE.size, number)

    def ring_node(self, number: int) -> None:
        """Ring the SuperNode of a number, if it is on this machine."""
        for place, bell in enumerate(self.nodes):
            if _NODE.unpack_from(self._numbers, place * _NODE.size) == (number,):
                bell.ring()


@dataclass(frozen=True)
class Place:
    """A SuperNode's place among the bells.

    Args:
        bells: The bells.
        number: Place of the SuperNode among those on this machine.
        is_told: Whether the server is on this machine, and rings.
    """

    bells: Bells
    number: int
    is_told: bool

    @property
    def node(self) -> Bell:
        """The bell of the SuperNode."""
        return self.bells.nodes[self.number]

    @property
    def tasks(self) -> Bell:
        """The bell of its SuperExec."""
        return self.bells.tasks[self.number]


_here: list[Bells] = []


def hang(bells: Bells) -> None:
    """Make bells those of this process, and of the forks that it makes later."""
    _here[:] = [bells]


def bells_here() -> Bells:
    """The bells of this process; without a fleet on this machine, some that nobody rings."""
    if not _here:
        hang(Bells(0, others=True))
    return _here[0]
