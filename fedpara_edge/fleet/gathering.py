"""The updates of a round: each device is called with what it lacks, and each answer becomes a file as it comes.

A device that went away, answers too late, refuses or sends something else costs the round nothing but its update; while
time is left, one that has come meanwhile takes the place of one that went away.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedpara_edge.errors import InvalidUpdateError, TooFewUpdatesError, counted
from fedpara_edge.fleet.exchange import Exchange, Failure
from fedpara_edge.fleet.federation import Federation
from fedpara_edge.fleet.messages import Answer, Call
from fedpara_edge.fleet.settings import FleetConfig
from fedpara_edge.simulation.plan.devices import GONE
from fedpara_edge.simulation.sampling import draw_participants
from fedpara_edge.storage.atomic import replacing_file

if TYPE_CHECKING:
    from flwr.serverapp import Grid

MOST_CALLS = 3
"""Calls of one device in one round: it may lack first a bundle, then weights."""
WAIT_SECONDS = 0.2
Say = Callable[[str], None]


@dataclass
class Gathered:
    """What came of the calls of a round.

    Attributes:
        updates: Update files of this round, and late ones of earlier rounds.
        participants: Number of devices that were called, or whose update was there.
        failures: Number of those that sent no update, by reason.
        down_bytes: Bytes of all files that were sent.
        seconds: Time that each training took.
    """

    updates: list[Path] = field(default_factory=list)
    participants: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    down_bytes: int = 0
    seconds: list[float] = field(default_factory=list)


def wait_for_devices(grid: Grid, count: int, seconds: float) -> set[int]:
    """Wait for some devices; those that are there.

    Raises:
        TooFewUpdatesError: They don't come in time.
    """
    end = time.monotonic() + seconds
    while len(nodes := set(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise TooFewUpdatesError(
                f"expected at least {counted(count, 'device')} within {seconds:g} s, found {len(nodes)}; start "
                "flower-supernode on more, or ask for fewer (nodes)"
            )
        time.sleep(WAIT_SECONDS)
    return nodes


def gather(
    grid: Grid, exchange: Exchange, federation: Federation, config: FleetConfig, round: int, say: Say
) -> Gathered:
    """Call the devices of a round and write what they send to files.

    Args:
        grid: Flower's grid.
        exchange: Exchange of calls and answers over it.
        federation: Federation.
        config: Settings.
        round: Round to train, from 0 on.
        say: Function that is called with what goes wrong with a device, a line each.

    Raises:
        TooFewUpdatesError: No device is there.
        FedparaError: A file is damaged, or the disk refuses a write.
    """
    arrived = federation.arrived(round)
    here = wait_for_devices(grid, 0 if arrived else 1, config.wait_seconds) - exchange.busy
    names = sorted(map(str, here | arrived))
    count = federation.plan.participants
    drawn = draw_participants(names, count and min(count, len(names)), seed=federation.seed, round=round)
    calling = _Calling(grid, exchange, federation, round, say)
    calling.chosen = {int(name) for name in drawn} | arrived
    calling.gathered.updates = [federation.update(node, round) for node in sorted(arrived)]
    for node in sorted(calling.chosen - arrived):
        calling.ask(node)
    for reply in exchange.replies(time.monotonic() + config.round_seconds):
        if isinstance(reply.found, Failure):
            calling.fail(reply.node, reply.found)
        else:
            calling.take(reply.node, reply.round, reply.found)
    federation.write_nodes({node: number for node, number in calling.held.items() if number >= 0})
    calling.gathered.participants = len(calling.chosen)
    return calling.gathered


class _Calling:
    """The calls of a round under way."""

    def __init__(self, grid: Grid, exchange: Exchange, federation: Federation, round: int, say: Say) -> None:
        self._grid, self._exchange, self._federation, self._round, self._say = grid, exchange, federation, round, say
        self._base = federation.read_weights(round).base
        self._calls: Counter[int] = Counter()
        self.held = federation.nodes()
        self.chosen: set[int] = set()
        self.gathered = Gathered()

    def ask(self, node: int) -> None:
        """Call a device, with what it lacks as far as this is known."""
        self._calls[node] += 1
        self._exchange.ask(node, self._round, lambda: self._call(node))

    def take(self, node: int, round: int, answer: Answer) -> None:
        """Write the update in an answer, call the device again with what it lacks, or note its failure."""
        if answer.lacks and round == self._round and self._calls[node] < MOST_CALLS:
            self.held[node] = -1
            if "bundle" in answer.lacks:
                del self.held[node]
            self.ask(node)
        elif (update := answer.files.get("update")) is None:
            code, message = answer.code or InvalidUpdateError.code, answer.message or "expected an update, found none"
            self.fail(node, Failure(code, message))
        else:
            path = self._federation.update(node, round)
            if (signature := answer.files.get("signature")) is not None:
                _write(path.with_name(f"{path.name}.dsse"), signature)
            _write(path, update)
            self.gathered.updates.append(path)
            self.gathered.seconds.append(answer.numbers.get("seconds", 0.0))
            self.held[node] = max(round, self.held.get(node, -1))

    def fail(self, node: int, failure: Failure) -> None:
        """Note that a device sent no update, and call another in the place of one that went away."""
        self.gathered.failures[failure.code] += 1
        self._say(f"round {self._round + 1}: device {node}: [{failure.code}] {failure.message}")
        if failure.code != GONE:
            return
        self.held.pop(node, None)
        spare = set(self._grid.get_node_ids()) - self.chosen - self._exchange.busy
        if spare:
            self.chosen.add(min(spare))
            self.ask(min(spare))

    def _call(self, node: int) -> Call:
        federation = self._federation
        paths = federation.files_for(self.held.get(node), self._round)
        files = {name: path.read_bytes() for name, path in paths.items()}
        self.gathered.down_bytes += sum(map(len, files.values()))
        return Call(
            fingerprint=federation.bundle.manifest.fingerprint,
            round=self._round,
            base=self._base,
            options=federation.options(),
            run=federation.run,
            files=files,
        )


def _write(path: Path, content: bytes) -> None:
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)
