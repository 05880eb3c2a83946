"""A federation that runs: its rounds open, take updates, close, are aggregated, and the next one opens.

All of it is on the disk (`folder`, `rounds`) before anybody is told, and is read from there at the start. A round that
was closed is aggregated from the same updates again, to the same bytes, until its result is written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.errors import FedparaError, InputError, TooFewUpdatesError, counted
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.task import Phase, Task
from fedpara_edge.serving.asking import draw, find_obstacle
from fedpara_edge.serving.config import ServeConfig
from fedpara_edge.serving.devices import Devices
from fedpara_edge.serving.events import OnEvent, ignore
from fedpara_edge.serving.folder import ServerFolder
from fedpara_edge.serving.guarding import Guard
from fedpara_edge.serving.openround import OpenRound, read_round
from fedpara_edge.serving.outcome import complete, recall, tell_rejected
from fedpara_edge.serving.receiving import Receipt, check_phase, check_sender, read_header
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.serving.rounds import Refusal, RoundFolder, read_result
from fedpara_edge.storage.atomic import sha256_of, sync
from fedpara_edge.storage.rounds import remove_rounds_before

UNGUARDED = Guard()


class Federation:
    """A federation on a server's state folder, which is locked. Its methods may be called from several threads.

    Args:
        folder: State folder.
        aggregate: Aggregation of the updates.
        config: Conditions on which rounds open and close.
        settings: Options of the devices' training, by name.
        guard: Demands on updates beyond that they fit, and the budget of noise.
        clock: Function that tells the time in seconds since 1970.
        on_event: Function that is told what happens.

    Attributes:
        devices: The devices that joined.
        current: Round that is open or being aggregated.
        error: Reason why the aggregation can't go on; None if it can.

    Raises:
        FedparaError: A file of the folder is damaged or can't be written.
    """

    def __init__(
        self,
        folder: ServerFolder,
        aggregate: AggregateConfig,
        config: ServeConfig,
        settings: Mapping[str, Any],
        *,
        guard: Guard = UNGUARDED,
        clock: Callable[[], float] = time.time,
        on_event: OnEvent = ignore,
    ) -> None:
        self._folder, self._aggregate, self._config, self._settings = folder, aggregate, config, dict(settings)
        self._clock, self._tell, self._guard = clock, on_event, guard
        self._lock = threading.RLock()
        self._sent_meanwhile = 0
        self._is_paused = False
        self.error: str | None = None
        self.current: OpenRound
        self.listeners: list[Callable[[], None]] = []
        self.devices = Devices(folder.devices)
        newest = folder.newest
        behind = newest > 0 and read_result(folder.round(newest - 1)) is None
        self._load(newest - 1 if behind else newest)
        recall(self.devices, self.current, folder)

    @property
    def phase(self) -> Phase:
        """Phase of the round, as devices are told."""
        with self._lock:
            if self.round.closed is not None:
                return "closing"
            is_done = self._config.rounds is not None and self.number >= self._config.rounds
            if is_done or self.current.unpaid is not None:
                return "finished"
            return "paused" if self._is_paused else "open"

    @property
    def number(self) -> int:
        """Number of the round that is open or being aggregated: that of the weights from which devices train."""
        return self.current.number

    @property
    def round(self) -> RoundFolder:
        """Folder of that round."""
        return self.current.folder

    @property
    def rounds_wanted(self) -> int | None:
        """Rounds after which the federation is finished; None for no end."""
        return self._config.rounds

    @property
    def privacy(self) -> Mapping[str, Any] | None:
        """The noise on the means with its budget and what is spent of it, plain data; None without."""
        return self._guard.spent

    @property
    def bundle(self) -> Bundle:
        """Bundle that is trained."""
        return self._folder.bundle

    def task(self, client: str) -> Task:
        """The task of a device, which is asked to train if there is a place for it."""
        now = self._clock()
        with self._lock:
            self.devices.see(client, now=now)
            current, phase = self.current, self.phase
            obstacle = find_obstacle(client, current, phase, now=now)
            if obstacle is None and client not in current.folder.asked:
                current.folder.ask([client])
                self._tell("device_asked", client=client, round=current.number)
            return Task(
                fingerprint=current.base.fingerprint,
                round=current.number,
                base=current.base.base,
                phase=phase,
                train=obstacle is None,
                reason=obstacle and obstacle.reason,
                code=obstacle and obstacle.code,
                bundle=current.content.bundle,
                weights=current.content.weights,
                history=current.content.history,
                control=current.content.control,
                updates="updates",
                settings=self._settings,
                run=current.judge.run,
            )

    def take(self, path: Path, client: str) -> Receipt:
        """Take a complete update of a device, once, if `aggregate` would.

        Args:
            path: File, which is moved away.
            client: Device that sent it.

        Raises:
            RefusedError: It is refused.
        """
        size = path.stat().st_size
        try:
            receipt = self._take(path, client)
        except RefusedError as error:
            refused = RefusedError(f"update of {client!r}: {error}", status=error.status, code=error.code)
            if error.status < 500:
                refusal = Refusal(client=client, code=error.code, message=str(refused), bytes=size)
                self.round.refuse(refusal)
                self.devices.judge(client, round=None, error=refusal.message)
                self._tell("update_refused", level=logging.WARNING, **asdict(refusal))
            raise refused from error
        self.devices.judge(client, round=receipt.round, error=None)
        if receipt.is_new:
            self._tell("update_taken", client=client, round=receipt.round)
        return receipt

    def note_sent(self, bytes: int) -> None:
        """Count what was sent to a device, for the round that is open or the next one."""
        with self._lock:
            if self.round.closed is None:
                self.round.note_sent(bytes)
            else:
                self._sent_meanwhile += bytes

    def seconds_left(self) -> float | None:
        """Time until the round may have to be closed; 0 if it has to be now, None if only an update can do that."""
        with self._lock:
            return self.current.seconds_left(self._clock()) if self.phase == "open" else None

    def look_at_list(self) -> None:
        """Judge by the list of clients as it is now, if that changed; a damaged one is told of and changes nothing."""
        with self._lock:
            if not self._guard.is_outdated:
                return
            try:
                self.current = replace(self.current, judge=self._guard.for_round())
            except InputError as error:
                self._tell("error", level=logging.ERROR, code=error.code, message=str(error))
                return
            self._tell("list_read", round=self.number)
        self._changed()

    def close(self) -> None:
        """Close the round that is open with the updates that it has.

        Raises:
            RefusedError: It has fewer than count, or is not open.
        """
        with self._lock:
            if self.round.closed is None and self.round.count < self.current.fewest:
                raise RefusedError(
                    f"expected at least {counted(self.current.fewest, 'update')} to close round {self.number}, found "
                    f"{self.round.count}",
                    status=409,
                )
            if self.phase not in ("open", "paused"):
                raise RefusedError(f"expected a round that is open, found none: {self.phase}", status=409)
            self.round.close(self._clock())
            self._tell("round_closed", round=self.number, updates=self.round.count)
        self._changed()

    def pause(self, is_paused: bool) -> None:
        """Ask no device to train from now on, and close no round; or go on. Updates under way are still taken."""
        with self._lock:
            self._is_paused = is_paused
            if not is_paused and self.current.unpaid is None:
                self.error = None
        self._tell("paused" if is_paused else "resumed", round=self.number)
        self._changed()

    def advance(self) -> None:
        """Aggregate the round if it is closed, and open the next one. Updates are not taken meanwhile.

        An error stops the federation (`error`) until it is resumed, which tries again.
        """
        closed = self.round.closed
        if closed is None or self.error is not None:
            return
        try:
            self._advance(closed)
        except TooFewUpdatesError as error:
            with self._lock:
                self.current = replace(self.current, needed=self.round.count + 1)
                self.round.reopen()
            self._tell("round_reopened", level=logging.WARNING, round=self.number, message=str(error))
        except FedparaError as error:
            with self._lock:
                self.error, self._is_paused = str(error), True
            self._tell("error", level=logging.ERROR, code=error.code, message=str(error))
        self._changed()

    def _load(self, number: int) -> None:
        """Go on with a round, which is opened if it was not yet."""
        current = read_round(self._folder, number, aggregate=self._aggregate, config=self._config, guard=self._guard)
        error = None if current.unpaid is None else str(current.unpaid)
        if current.unpaid is not None:
            self._tell("error", level=logging.ERROR, code=current.unpaid.code, message=error)
        if current.folder.opened is None:
            now = self._clock()
            current.folder.open(now, draw(self.devices, self._config.participants, now=now))
            self._tell("round_opened", round=number, base=current.base.base)
        with self._lock:
            self.current, self.error = current, error
            current.folder.note_sent(self._sent_meanwhile)
            self._sent_meanwhile = 0

    def _take(self, path: Path, client: str) -> Receipt:
        digest = sha256_of(path)
        sync(path)
        while True:
            with self._lock:
                before = self.current
                if before.has_taken(digest):
                    return Receipt(client=client, round=before.number, is_new=False)
                check_phase(self.phase)
            header = read_header(path, before, client)
            with self._lock:
                if before.number != self.number:
                    continue
                check_phase(self.phase)
                check_sender(header, digest, self.current)
                self.round.take(path, header.client, header.round, digest)
            return Receipt(client=client, round=header.round, is_new=True)

    def _advance(self, closed: list[Path]) -> None:
        done, result = complete(self.current, closed, self._folder, self._guard, clock=self._clock)
        tell_rejected(self.devices, done)
        self._tell(
            "round_written",
            output=done.output,
            round=done.number,
            accepted=len(done.aggregation.accepted),
            rejected=len(done.aggregation.rejected),
            stragglers=len(result["stragglers"]),
            examples=result["examples"],
            received_bytes=result["received_bytes"],
        )
        self._load(done.number)
        self._remove_before(done.number - self._config.keep_rounds)

    def _remove_before(self, number: int) -> None:
        """Remove what nobody needs of the rounds before one; weights and results stay."""
        for name in ("changes", "control"):
            remove_rounds_before(self._folder.path / name, number)
        if number > 0:
            RoundFolder(self._folder.round(number - 1)).forget()

    def _changed(self) -> None:
        for listener in self.listeners:
            listener()
