"""A federation that runs: its rounds open, take updates, close, are aggregated, and the next one opens.

All of it is on the disk (`folder`, `rounds`) before anybody is told, and is read from there at the start. A round that
was closed is aggregated from the same updates again, to the same bytes, until its result is written.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.aggregation.gate import Gate
from fedpara_edge.aggregation.round import LEAST_KEPT, run_round
from fedpara_edge.aggregation.screening import read_whole, screen
from fedpara_edge.aggregation.staleness import recent
from fedpara_edge.errors import BudgetError, FedparaError, InputError, TooFewUpdatesError, counted
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.history import NO_HISTORY, History
from fedpara_edge.formats.serverstate import read_state_for, write_control
from fedpara_edge.formats.task import Obstacle, Phase, Task
from fedpara_edge.formats.update import UpdateHeader
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.serving.asking import ALIVE_SECONDS
from fedpara_edge.serving.config import ServeConfig
from fedpara_edge.serving.content import Content
from fedpara_edge.serving.devices import Devices
from fedpara_edge.serving.events import OnEvent, ignore
from fedpara_edge.serving.folder import ServerFolder
from fedpara_edge.serving.guarding import Guard
from fedpara_edge.serving.receiving import LATE, Receipt
from fedpara_edge.serving.refused import RefusedError, without_path
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
        number: Round that is open or being aggregated: that of the weights from which devices train.
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
        self._is_spent = False
        self._lock = threading.RLock()
        self._needed = self._sent_meanwhile = 0
        self._is_paused = False
        self.error: str | None = None
        self.listeners: list[Callable[[], None]] = []
        self.devices = Devices(folder.devices)
        newest = folder.newest
        behind = newest > 0 and read_result(folder.round(newest - 1)) is None
        self._load(newest - 1 if behind else newest)
        self._recall()

    @property
    def phase(self) -> Phase:
        """Phase of the round, as devices are told."""
        with self._lock:
            if self._round.closed is not None:
                return "closing"
            is_done = self._config.rounds is not None and self.number >= self._config.rounds
            if is_done or self._is_spent:
                return "finished"
            return "paused" if self._is_paused else "open"

    @property
    def round(self) -> RoundFolder:
        """Folder of the round that is open or being aggregated."""
        return self._round

    @property
    def wanted(self) -> int:
        """Number of updates that closes the round."""
        return max(self._config.updates, self._needed)

    @property
    def fewest(self) -> int:
        """Number of updates below which the round can't be closed."""
        return max(self._aggregate.min_updates, self._needed)

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

    @property
    def content(self) -> Content:
        """Files that devices may get now."""
        return self._content

    def task(self, client: str) -> Task:
        """The task of a device, which is asked to train if there is a place for it."""
        now = self._clock()
        with self._lock:
            self.devices.see(client, now=now)
            phase = self.phase
            obstacle = self._ask_or_say_why(client, phase, now)
            return Task(
                fingerprint=self._base.fingerprint,
                round=self.number,
                base=self._base.base,
                phase=phase,
                train=obstacle is None,
                reason=obstacle and obstacle.reason,
                code=obstacle and obstacle.code,
                bundle=self._content.bundle,
                weights=self._content.weights,
                history=self._content.history,
                control=self._content.control,
                updates="updates",
                settings=self._settings,
                run=self._judge.run,
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
                self._round.refuse(refusal)
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
            if self._round.closed is None:
                self._round.note_sent(bytes)
            else:
                self._sent_meanwhile += bytes

    def seconds_left(self) -> float | None:
        """Time until the round may have to be closed; 0 if it has to be now, None if only an update can do that."""
        with self._lock:
            if self.phase != "open":
                return None
            if self._round.count >= self.wanted:
                return 0.0
            if self._overdue_at is None or self._round.count < self.fewest:
                return None
            return max(self._overdue_at - self._clock(), 0.0)

    def look_at_list(self) -> None:
        """Judge by the list of clients as it is now, if that changed; a damaged one is told of and changes nothing."""
        with self._lock:
            if not self._guard.is_outdated:
                return
            try:
                self._judge = self._guard.for_round()
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
            if self._round.closed is None and self._round.count < self.fewest:
                raise RefusedError(
                    f"expected at least {counted(self.fewest, 'update')} to close round {self.number}, found "
                    f"{self._round.count}",
                    status=409,
                )
            if self.phase not in ("open", "paused"):
                raise RefusedError(f"expected a round that is open, found none: {self.phase}", status=409)
            self._round.close(self._clock())
            self._tell("round_closed", round=self.number, updates=self._round.count)
        self._changed()

    def pause(self, is_paused: bool) -> None:
        """Ask no device to train from now on, and close no round; or go on. Updates under way are still taken."""
        with self._lock:
            self._is_paused, self.error = is_paused, self.error if is_paused or self._is_spent else None
        self._tell("paused" if is_paused else "resumed", round=self.number)
        self._changed()

    def advance(self) -> None:
        """Aggregate the round if it is closed, and open the next one. Updates are not taken meanwhile.

        An error stops the federation (`error`) until it is resumed, which tries again.
        """
        closed = self._round.closed
        if closed is None or self.error is not None:
            return
        try:
            self._advance(closed)
        except TooFewUpdatesError as error:
            with self._lock:
                self._needed = self._round.count + 1
                self._round.reopen()
            self._tell("round_reopened", level=logging.WARNING, round=self.number, message=str(error))
        except FedparaError as error:
            with self._lock:
                self.error, self._is_paused = str(error), True
            self._tell("error", level=logging.ERROR, code=error.code, message=str(error))
        self._changed()

    def _load(self, number: int) -> None:
        """Go on with a round, which is opened if it was not yet."""
        folder, config = self._folder, self._config
        base = read_weights(folder.weights(number), folder.bundle)
        state = read_state_for(folder.server, base) if number else None
        history = recent(state, base, self._aggregate.max_staleness) if state else NO_HISTORY
        content = Content(folder, base, keep=config.keep_rounds)
        judge, spent = self._guard.for_round(), self._why_spent(number + 1)
        counted = {
            digest
            for earlier in range(max(number - config.keep_rounds, 0), number)
            for digest in RoundFolder(folder.round(earlier)).digests
        }
        round_ = RoundFolder(folder.round(number))
        if round_.opened is None:
            round_.open(self._clock(), self._draw())
            self._tell("round_opened", round=number, base=base.base)
        with self._lock:
            self.number, self._base, self._history, self._content = number, base, history, content
            self._round, self._counted, self._needed = round_, counted, 0
            self._judge, self._is_spent, self.error = judge, spent is not None, spent
            round_.note_sent(self._sent_meanwhile)
            self._sent_meanwhile = 0
            opened = round_.opened
            self._overdue_at = None if config.deadline is None or opened is None else opened + config.deadline

    def _why_spent(self, number: int) -> str | None:
        """The reason why the noise of a round could not be paid for; None if it could."""
        try:
            self._guard.check_budget(number)
        except BudgetError as error:
            self._tell("error", level=logging.ERROR, code=error.code, message=str(error))
            return str(error)
        return None

    def _recall(self) -> None:
        """Have the devices know what became of their last updates, as far as the rounds tell that are kept."""
        for number in range(max(self.number - self._config.keep_rounds, 0), self.number):
            result = read_result(self._folder.round(number)) or {}
            for update in result.get("accepted", ()):
                self.devices.judge(update["client"], round=number - update["staleness"], error=None)
        for refusal in self._round.refused:
            self.devices.judge(refusal.client, round=None, error=refusal.message)
        for device in self.devices.all:
            if self._round.has_sent(device.client, self.number):
                self.devices.judge(device.client, round=self.number, error=None)

    def _draw(self) -> list[str]:
        """Devices to ask first: some of those that are here, if they are more than there are places."""
        here = self.devices.seen_since(self._clock() - ALIVE_SECONDS)
        places = self._config.participants
        return secrets.SystemRandom().sample(here, places) if places is not None and places < len(here) else []

    def _ask_or_say_why(self, client: str, phase: Phase, now: float) -> Obstacle | None:
        """The reason why a device is not to train; None if it is, and then it counts as asked."""
        if phase != "open":
            reasons = {
                "closing": "the updates of this round are being put together",
                "paused": "the federation is paused",
                "finished": "the federation is finished",
            }
            return Obstacle(phase, reasons[phase])
        if self._round.has_sent(client, self.number):
            return Obstacle("sent", "the update of this device is there; the round is not over yet")
        if (obstacle := self._judge.obstacle(client)) is not None:
            return obstacle
        if client not in self._round.asked:
            places = self._config.participants
            is_overdue = self._overdue_at is not None and now > self._overdue_at
            if places is not None and len(self._round.asked) >= places and not is_overdue:
                return Obstacle("drawn", "other devices were drawn for this round")
            self._round.ask([client])
            self._tell("device_asked", client=client, round=self.number)
        return None

    def _take(self, path: Path, client: str) -> Receipt:
        digest = sha256_of(path)
        sync(path)
        while True:
            with self._lock:
                number, base, history, gate = self.number, self._base, self._history, self._judge.gate
                if digest in self._counted or digest in self._round.digests:
                    return Receipt(client=client, round=number, is_new=False)
                self._check_open()
            header = self._read(path, base, history, gate)
            if header.client != client:
                raise RefusedError(
                    f"expected the name under which this device joined, found {header.client!r}",
                    status=403,
                    code="unknown_client",
                )
            with self._lock:
                if number != self.number:
                    continue
                self._check_open()
                self._check_sender(header, digest)
                self._round.take(path, header.client, header.round, digest)
            return Receipt(client=client, round=header.round, is_new=True)

    def _check_open(self) -> None:
        phase = self.phase
        if phase == "closing":
            raise RefusedError("expected a round that is open, found it being aggregated; send it again", status=503)
        if phase == "finished":
            raise RefusedError("expected a round that is open, found the federation finished", status=409, code=LATE)

    def _check_sender(self, header: UpdateHeader, digest: str) -> None:
        found = self._round.digest_of(header.client, header.round)
        if found not in (None, digest):
            raise RefusedError(
                "expected one of each device in a round, found another one before it", status=409, code="conflict"
            )
        if header.round == self.number and header.client not in self._round.asked:
            raise RefusedError(
                "expected a device that was drawn for the round, found another", status=409, code="not_drawn"
            )

    def _read(self, path: Path, base: Weights, history: History, gate: Gate | None) -> UpdateHeader:
        """The header of an update that is good, values included."""
        updates, rejected = screen([path], base, self._aggregate.server_algorithm, gate, history=history)
        if not rejected:
            readable, rejected = read_whole(updates, base)
        if rejected:
            code, reason = rejected[0].code, without_path(rejected[0])
            raise RefusedError(reason, status=409 if code in (LATE, "wrong_base", "duplicate") else 422, code=code)
        return readable[0][1].header

    def _advance(self, closed: list[Path]) -> None:
        folder, number, keep = self._folder, self.number + 1, max(self._config.keep_rounds, LEAST_KEPT)
        started = self._clock()
        done = run_round(
            closed,
            folder.weights(self.number),
            folder.weights(number),
            replace(self._aggregate, strict=False),
            state=folder.server,
            change=None if self._aggregate.downlink_codec is None else folder.change(number),
            keep=keep,
            gate=self._judge.gate,
            budget=self._guard.budget,
        )
        write_control(folder.control(number), done.aggregation.state)
        asked, taken = self._round.asked, {update.client for update in done.aggregation.accepted}
        refused = {refusal.client: refusal.code for refusal in self._round.refused}
        refused |= {str(update.client): update.code for update in done.aggregation.rejected}
        stragglers = sorted(asked - taken - refused.keys())
        result = {
            "opened": self._round.opened,
            "closed": started,
            "ended": self._clock(),
            "asked": len(asked),
            "refused": {client: refused[client] for client in sorted(refused.keys() & asked - taken)},
            "refused_bytes": sum(refusal.bytes for refusal in self._round.refused),
            "sent_bytes": self._round.sent_bytes,
            "stragglers": stragglers,
            "privacy": self._guard.spent,
            **done.to_json(),
        }
        self._round.finish(result)
        for update in done.aggregation.rejected:
            if update.client is not None:
                message = f"update of {update.client!r}: {without_path(update)}"
                self.devices.judge(update.client, round=None, error=message)
        self._tell(
            "round_written",
            output=done.output,
            round=number,
            accepted=len(done.aggregation.accepted),
            rejected=len(done.aggregation.rejected),
            stragglers=len(stragglers),
            examples=result["examples"],
            received_bytes=result["received_bytes"],
        )
        self._load(number)
        self._remove_before(number - self._config.keep_rounds)

    def _remove_before(self, number: int) -> None:
        """Remove what nobody needs of the rounds before one; weights and results stay."""
        for name in ("changes", "control"):
            remove_rounds_before(self._folder.path / name, number)
        if number > 0:
            RoundFolder(self._folder.round(number - 1)).forget()

    def _changed(self) -> None:
        for listener in self.listeners:
            listener()
