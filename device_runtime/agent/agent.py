"""The agent's life: join, wait for a round, train, send, and again, until the federation is finished.

Killed at any time, it goes on where it was: an update that was not sent is sent first, a training resumes from the
device's state folder, and transfers from their last byte. A server that can't be reached is tried again (`patience`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_runtime.agent.conditions import Conditions
from device_runtime.agent.link import JoinLink, connect
from device_runtime.agent.member import Member
from device_runtime.agent.patience import FIRST_WAIT_SECONDS, Patience
from device_runtime.agent.transfers import MissingError, forget, send
from device_runtime.config import OWN, TrainCall
from device_runtime.data import Dataset, open_data
from device_runtime.progress import OnStep
from device_runtime.sources import Reading
from device_runtime.training import train
from device_runtime.tuning import Choice, open_tuned
from fedpara_edge.errors import DivergedError, InputError, InvalidUpdateError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.task import Task
from fedpara_edge.formats.update import read_update_round
from fedpara_edge.options import bind, option
from fedpara_edge.storage.atomic import Ready
from fedpara_edge.storage.locking import hold_folder

OnEvent = Callable[..., None]
"""Function of an event: its name, and fields."""
Seals = Callable[[str], Ready]
"""Function of a run that gives the function which signs updates for it."""
CONDITION_SECONDS = 30.0
"""Time between two looks at conditions that don't hold."""
SLOW_STEP_SECONDS = 5.0
"""Time that each step takes longer while conditions don't hold, so that a stop is still heard between two."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig(Conditions):
    """How an agent trains and for how long it takes part.

    Args:
        rounds: Rounds after which the agent ends; None for as long as there are any.
        patience: Time in seconds without an answer of the server after which the agent ends; None for never.

    Raises:
        InputError: A value is out of its range.
    """

    rounds: int | None = option(None, minimum=1, unset="all", help="Rounds to take part in.")
    patience: float | None = option(
        None, above=0, unset="no end", help="Seconds without an answer of the server after which to give up."
    )


@dataclass(frozen=True, kw_only=True)
class AgentResult:
    """What an agent did.

    Args:
        client: Name of the device.
        rounds: Rounds in which its update was taken.
        refused: Updates that were refused.
        sent_bytes: Size of all updates that were taken.
        received_bytes: Number of bytes received.
    """

    client: str
    rounds: tuple[int, ...]
    refused: int
    sent_bytes: int
    received_bytes: int


class Agent:
    """An agent with its folder.

    Args:
        member: Member of the federation.
        data: Source of the local data.
        reading: Options of how it is read.
        config: Conditions, and for how long to take part.
        own: Options of `TrainCall` that are the device's own (`config.OWN`).
        seals: Function of a run that gives the function which signs updates for it; None for a device without a key.
        on_event: Function that is told what happens.
        on_step: Function of each step of a training.
        sleep: Function that waits for a number of seconds.
    """

    def __init__(
        self,
        member: Member,
        data: Path,
        reading: Reading,
        config: AgentConfig,
        *,
        own: Mapping[str, Any],
        seals: Seals | None = None,
        on_event: OnEvent,
        on_step: OnStep | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._member, self._data, self._reading, self._config, self._own = member, data, reading, config, own
        self._tell, self._on_step, self._sleep, self._seals = on_event, on_step, sleep, seals
        self._patiently = Patience(seconds=config.patience, tell=on_event, sleep=sleep)
        self._dataset: tuple[str, Dataset] | None = None
        self._rounds: list[int] = []
        self._refused = self._sent_bytes = 0

    def run(self, link: JoinLink, client: str | None) -> AgentResult:
        """Take part until the federation is finished, or for as many rounds as asked.

        Raises:
            InputError: The link, the data or an option does not fit.
            TrustError: The server does not let this device in.
            UnreachableError: The server can't be reached for longer than the agent's patience.
            FedparaError: The disk refuses a write, or the server sends what does not fit.
            KeyboardInterrupt: It is to stop.
        """
        member, failed = self._member, -1
        self._patiently(lambda: member.join(link, client))
        self._tell("joined", client=member.client, server=member.connection.url)
        while True:
            if member.update.exists():
                self._send()
            if self._config.rounds is not None and len(self._rounds) >= self._config.rounds:
                break
            task = self._patiently(lambda: member.task(wait=True))
            if task.phase == "finished":
                break
            if not task.train or task.round == failed:
                self._tell("waiting", round=task.round, reason=task.reason or "the last training of the round failed")
                self._sleep(FIRST_WAIT_SECONDS)
                continue
            self._wait_for_conditions()
            try:
                self._train(task)
            except MissingError as error:
                self._tell("round_over", round=task.round, message=str(error))
            except DivergedError as error:
                failed = task.round
                self._tell("training_failed", round=task.round, message=str(error))
        return AgentResult(
            client=str(member.client),
            rounds=tuple(self._rounds),
            refused=self._refused,
            sent_bytes=self._sent_bytes,
            received_bytes=member.received_bytes,
        )

    def _train(self, task: Task) -> None:
        """Train for a task, and leave the update to be sent."""
        member, seal = self._member, self._seal(task)
        bundle = self._patiently(lambda: member.bundle(task))
        control = self._patiently(lambda: member.receive(task, bundle))
        call = self._call(task)
        self._tell("training", round=task.round, client=member.client)
        dataset = self._open_data(bundle)
        result = train(
            open_tuned(bundle, call, dataset, member.own, on_choice=self._tell_choice),
            dataset,
            member.weights,
            call,
            output=member.update,
            encoder=call.encoder,
            privacy=call.mechanism,
            state=member.own,
            client=member.client,
            server_state=control,
            seal=seal,
            on_step=self._between_steps,
        )
        self._tell("training_finished", update=member.update, **result.log_fields)

    def _tell_choice(self, choice: Choice) -> None:
        self._tell("tuned", message=str(choice), **choice.log_fields)

    def _call(self, task: Task) -> TrainCall:
        """The options of a training: the server's, and the device's own.

        Raises:
            InputError: This release does not know one.
        """
        settings = {name: value for name, value in task.settings.items() if name not in OWN}
        try:
            return bind(TrainCall, {**settings, **self._own})
        except InputError as error:
            raise InputError(f"{self._member.connection.url}: settings of the task: {error}") from error

    def _seal(self, task: Task) -> Ready | None:
        """The function that signs the update of a task; None where nobody asks for a signature.

        Raises:
            InputError: There is no key, or none is asked for.
        """
        if task.run is None and self._seals is not None:
            raise InputError(
                "expected with a server that has a list of clients, found without; leave it out", key="key"
            )
        if task.run is not None and self._seals is None:
            raise InputError(
                f"expected this device's private key, as updates have to be signed for run {task.run!r}, found none; "
                "give it",
                key="key",
            )
        return None if task.run is None or self._seals is None else self._seals(task.run)

    def _send(self) -> None:
        """Send the update that is there, and remove it once it was taken or refused."""
        update = self._member.update
        self._wait_for_conditions()
        number, size = read_update_round(update), update.stat().st_size
        try:
            self._patiently(lambda: send(self._member.connection, "updates", update))
        except InvalidUpdateError as error:
            self._refused += 1
            self._tell("update_refused", code=error.code, message=str(error))
        else:
            self._rounds.append(number)
            self._sent_bytes += size
            self._tell("update_sent", round=number, bytes=size)
        forget(update)

    def _open_data(self, bundle: Bundle) -> Dataset:
        fingerprint = bundle.manifest.fingerprint
        if self._dataset is None or self._dataset[0] != fingerprint:
            self._dataset = fingerprint, open_data(self._data, bundle.manifest, self._reading)
        return self._dataset[1]

    def _between_steps(self, step: int, steps: int, loss: float) -> None:
        if self._on_step is not None:
            self._on_step(step, steps, loss)
        if self._config.obstacle(is_training=True) is not None:
            self._sleep(SLOW_STEP_SECONDS)

    def _wait_for_conditions(self) -> None:
        while (obstacle := self._config.obstacle()) is not None:
            self._tell("waiting", reason=obstacle)
            self._sleep(CONDITION_SECONDS)


def run_agent(
    link: JoinLink,
    data: Path,
    state: Path,
    config: AgentConfig,
    *,
    reading: Reading,
    client: str | None = None,
    ca: Path | None = None,
    own: Mapping[str, Any],
    seals: Seals | None = None,
    on_event: OnEvent,
    on_step: OnStep | None = None,
) -> AgentResult:
    """Take part in a federation with local data (`Agent.run`).

    Args:
        link: Join link.
        data: Source of the local data.
        state: Folder of the agent, made if it is missing.
        config: Conditions, and for how long to take part.
        reading: Options of how the data is read.
        client: Name to join under; None for one that is made.
        ca: Certificates that vouch for the server, PEM; None for the link's or the system's.
        own: Options of `TrainCall` that are the device's own (`config.OWN`).
        seals: Function of a run that gives the function which signs updates for it; None for a device without a key.
        on_event: Function that is told what happens: the name of an event, and fields.
        on_step: Function of each step of a training.

    Raises:
        BusyError: Another agent uses the folder.
        FedparaError: As of `Agent.run`.
    """
    with hold_folder(state, kind="an agent's folder", lock="lock", parents=False):
        patiently = Patience(seconds=config.patience, tell=on_event)
        member = Member(state, patiently(lambda: connect(link, ca, state)))
        return Agent(member, data, reading, config, own=own, seals=seals, on_event=on_event, on_step=on_step).run(
            link, client
        )
