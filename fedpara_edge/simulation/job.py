"""One federation: an arm of a plan with one of its seeds, and its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.simulation.data.clients import Clients
from fedpara_edge.simulation.folder import JobFolder
from fedpara_edge.simulation.metrics import Event, Journal
from fedpara_edge.simulation.plan.plan import Arm, Plan
from fedpara_edge.simulation.sampling import draw_participants
from fedpara_edge.simulation.tasks.engines import Model
from fedpara_edge.simulation.torchengine.choice import TorchSource

MOST_RANK_OPERATIONS = 2_000_000_000
"""About 0.3 s of singular values on one core."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A federation.

    Args:
        plan: Plan that it is part of.
        arm: Arm of the plan.
        seed: Seed of the plan.
        folder: Folder for its files.
        bundle: Bundle of the arm and seed.
        clients: Clients and their rows.
        journal: Metrics of the run.
        torch: Source of the engine `torch`, if that trains and evaluates; None for the arm's engine.
        kept_engines: Number of engines that a worker keeps open.
        most_rank_operations: Most multiplications that the ranks of the weights may take in a round that is not the
            last; in that one they are found at any cost.
    """

    plan: Plan
    arm: Arm
    seed: int
    folder: JobFolder
    bundle: Bundle
    clients: Clients
    journal: Journal
    torch: TorchSource | None = None
    kept_engines: int = 1
    most_rank_operations: int = MOST_RANK_OPERATIONS

    @property
    def name(self) -> str:
        """Arm and seed, as a message names them."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def model(self) -> Model:
        """The model, as a worker opens it."""
        return Model(bundle=self.bundle.path, engine=self.arm.train.engine, torch=self.torch, kept=self.kept_engines)

    @property
    def has_own_models(self) -> bool:
        """Whether every client has a model of its own."""
        return self.arm.local_only or bool(self.bundle.manifest.layout.with_role("personal"))

    @property
    def rounds_done(self) -> int:
        """Number of rounds whose metrics are written."""
        return len(self.journal.of(self.arm.name, self.seed, "round"))

    def participants(self, round: int) -> tuple[str, ...]:
        """Names of the clients that take part in a round."""
        return draw_participants(self.clients.names, self.plan.participants, seed=self.seed, round=round)

    def missing(self, round: int) -> dict[str, str]:
        """Participants of a round that send nothing, with the reason of each."""
        examples = {client.name: client.examples for client in self.clients.clients}
        mine = {client: examples[client] for client in self.participants(round)}
        numbers = {client: number for number, client in enumerate(self.clients.names)}
        return self.plan.devices.missing(mine, numbers, seed=self.seed, round=round)

    def trained(self, round: int) -> tuple[str, ...]:
        """Names of the participants of a round that train to its end."""
        missing = self.missing(round)
        return tuple(client for client in self.participants(round) if client not in missing)

    def weights_of(self, client: str, number: int) -> Path:
        """The weights that a client has, or would get, after `number` rounds."""
        initial = self.bundle.file(WEIGHTS)
        if self.arm.local_only:
            own = next((past for past in range(number, 0, -1) if client in self.trained(past - 1)), 0)
            return self.folder.own_weights(client, own) if own else initial
        return self.folder.weights(number) if number else initial

    def state_of(self, client: str) -> Path | None:
        """A client's state folder, if it has one yet."""
        folder = self.folder.state(client)
        return folder if folder.is_dir() else None

    def event(self, event: str, /, **values: Any) -> Event:
        """A line of the metrics, about this federation."""
        return {"event": event, "arm": self.arm.name, "seed": self.seed, **values}
