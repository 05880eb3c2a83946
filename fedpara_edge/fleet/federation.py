"""A federation of a fleet on the server's disk: an arm of a plan in a run folder, as `simulate` has it.

Besides the files of `simulation.folder` there are

    work/<arm>/seed-<s>/updates/<round>-<node>.safetensors    as they came, with their envelopes
    work/<arm>/seed-<s>/nodes.json                            {node: round of the weights that it has}
    work/<arm>/seed-<s>/ledger/, privacy/                     what was accepted of signed updates, and what was spent

A round is done when its line is in `metrics.jsonl`. A server that is killed goes on with the first one that is not, and
asks only those devices again whose updates of it are not there yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from device_runtime.config import TrainCall
from fedpara_edge.aggregation import AggregateConfig
from fedpara_edge.aggregation.gate import Gate
from fedpara_edge.errors import InputError
from fedpara_edge.fleet.device import IN_BUNDLE
from fedpara_edge.fleet.settings import FleetConfig
from fedpara_edge.formats.bundle import MANIFEST, WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.options import declared
from fedpara_edge.privacy.budget import Budget
from fedpara_edge.simulation.folder import JobFolder, open_run
from fedpara_edge.simulation.metrics import Event, Journal
from fedpara_edge.simulation.plan.plan import Arm, Plan, read_plan
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.rounds import remove_rounds_before
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

NODES = "nodes.json"


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A federation, locked for this process.

    Args:
        plan: Plan.
        arm: Arm of it.
        bundle: Bundle.
        folder: Folder for its files.
        journal: Metrics of the run.
        make_gate: Function that makes the judge of whose each update of a round is; it gives None without a list of
            clients.
        budget: Budget that pays for noise; None without noise.
        run: Name of the run that updates are signed for; empty without a list of clients.
    """

    plan: Plan
    arm: Arm
    bundle: Bundle
    folder: JobFolder
    journal: Journal
    make_gate: Callable[[], Gate | None]
    budget: Budget | None
    run: str

    @property
    def seed(self) -> int:
        """The seed of the plan that counts: its first."""
        return self.plan.seeds[0]

    @property
    def rounds_done(self) -> int:
        """Number of rounds whose metrics are written."""
        return len(self.events("round"))

    def events(self, kind: str) -> list[Event]:
        """Events of one kind of this federation."""
        return self.journal.of(self.arm.name, self.seed, kind)

    def event(self, kind: str, /, **values: Any) -> dict[str, Any]:
        """A line of the metrics, about this federation."""
        return {"event": kind, "arm": self.arm.name, "seed": self.seed, **values}

    def weights(self, number: int) -> Path:
        """Weights after `number` rounds."""
        return self.folder.weights(number) if number else self.bundle.file(WEIGHTS)

    def read_weights(self, number: int) -> Weights:
        """Weights after `number` rounds, read.

        Raises:
            FedparaError: They are damaged.
        """
        return read_weights(self.weights(number), self.bundle)

    def update(self, node: int, round: int) -> Path:
        """Place of a device's update of a round."""
        return self.folder.update(f"{round}-{node}")

    def arrived(self, round: int) -> set[int]:
        """Devices whose updates of a round are there."""
        found = (path.stem.partition("-") for path in self.folder.path.glob(f"updates/{round}-*.safetensors"))
        return {int(node) for _, _, node in found if node.isdecimal()}

    def nodes(self) -> dict[int, int]:
        """Round of the weights that each device has, of those that are known."""
        return read_rounds(self.folder.path / NODES)

    def write_nodes(self, nodes: Mapping[int, int]) -> None:
        """Remember which weights the devices have."""
        with replacing_file(self.folder.path / NODES) as temporary:
            temporary.write_text(json.dumps(nodes) + "\n", encoding="utf-8")

    def options(self) -> dict[str, Any]:
        """Options of the training of every device, as plain data."""
        own = ("threads", "tune", "save_seconds", "save_steps")
        train = {name: getattr(self.arm.train, name) for name in declared(TrainCall) if name not in own}
        return {**{name: value for name, value in train.items() if value is not None}, "seed": self.seed}

    def files_for(self, held: int | None, round: int) -> dict[str, Path]:
        """Files that a device needs to train a round, by the names under which they travel.

        Args:
            held: Round of the weights that it has; None for a device that has nothing.
            round: Round to train.
        """
        files: dict[str, Path] = {}
        if held is None:
            names = (MANIFEST, *self.bundle.manifest.files)
            files |= {f"{IN_BUNDLE}{name}": self.bundle.file(name) for name in names}
        changes = {n: self.folder.change(n) for n in range((held or 0) + 1, round + 1)}
        sizes = [path.stat().st_size if path.exists() else None for path in changes.values()]
        whole = self.weights(round)
        if None not in sizes and sum(size or 0 for size in sizes) < whole.stat().st_size:
            files |= {f"change-{number}": path for number, path in changes.items()}
        else:
            files["weights"] = whole
        if (control := self.folder.control(round)).exists():
            files["control"] = control
        return files

    def config(self, *, clients: int, min_updates: int) -> AggregateConfig:
        """Configuration of the server.

        Args:
            clients: Number of all clients.
            min_updates: Valid updates below which there are no next weights.
        """
        return replace(self.arm.server(clients=clients), min_updates=min_updates)

    def tidy(self, done: int) -> None:
        """Remove what only rounds before `done` needed: updates, weights and server states."""
        for path in self.folder.path.glob("updates/*"):
            round = path.name.partition("-")[0]
            if not round.isdecimal() or int(round) < done:
                path.unlink(missing_ok=True)
        for name in ("weights", "server", "control"):
            remove_rounds_before(self.folder.path / name, done)


def check_fit(arm: Arm, bundle: Bundle) -> None:
    """Refuse an arm of a plan whose devices could not train a bundle.

    Raises:
        InputError: The engine, the optimizer or the kind is another.
    """
    there = bundle.manifest.engines
    if arm.train.engine not in there:
        raise InputError(
            f"{bundle.path}: expected the files of engine {arm.train.engine}, found those of "
            f"{' and '.join(there) or 'none'}; export it again, or choose another train.engine"
        )
    try:
        arm.train.client_algorithm.check_optimizer(bundle.manifest.optimizer)
    except InputError as error:
        raise InputError(f"{bundle.path}: {error}") from error
    found = {layer.kind for layer in bundle.manifest.layout.layers} - {"dense"} or {"dense"}
    if found != {arm.model.kind}:
        raise InputError(
            f"{bundle.path}: expected model.kind {arm.model.kind}, as in arm {arm.name}, found "
            f"{' and '.join(sorted(found))}; export it by the plan, or choose another arm"
        )
    if arm.local_only:
        raise InputError(f"arm {arm.name}: expected one with a server, found local_only; choose another arm")


@contextmanager
def open_federation(config: FleetConfig) -> Iterator[Federation]:
    """Lock the run folder, made if it is missing, for as long as the context lasts.

    Raises:
        InputError: The plan does not fit the bundle, or is no growth of the one that the run began with.
        WrongBundleError: The bundle is damaged, or another than the one that the run began with.
        BusyError: Another process uses the folder.
    """
    plan = read_plan(config.plan)
    arm, bundle = plan.arm(config.arm), open_bundle(config.bundle)
    check_fit(arm, bundle)
    with open_run(config.run, config.plan) as run, ExitStack() as opened:
        folder = run.job(arm.name, plan.seeds[0])
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.make(())
        make_gate, name = _gates(config, arm, folder, opened)
        federation = Federation(
            plan=plan,
            arm=arm,
            bundle=bundle,
            folder=folder,
            journal=Journal(run.metrics),
            make_gate=make_gate,
            budget=_budget(arm, folder, opened),
            run=name,
        )
        federation.read_weights(federation.rounds_done)  # of this bundle, or else it ends here
        yield federation


def _gates(
    config: FleetConfig, arm: Arm, folder: JobFolder, opened: ExitStack
) -> tuple[Callable[[], Gate | None], str]:
    """The maker of gates that only signed updates of the clients in a list pass, and the name of their run."""
    if config.allow is None:
        return lambda: None, ""
    from fedpara_edge.trust.clients import read_clients
    from fedpara_edge.trust.ledger import open_ledger
    from fedpara_edge.trust.signatures import SignatureGate

    allow, late = config.allow, arm.aggregate.max_staleness
    run = read_clients(allow).run
    ledger = opened.enter_context(open_ledger(folder.path / "ledger", run))
    return lambda: SignatureGate(read_clients(allow), ledger, max_staleness=late), run


def _budget(arm: Arm, folder: JobFolder, opened: ExitStack) -> Budget | None:
    if arm.aggregate.privacy is None:
        return None
    from fedpara_edge.privacy.accounting import epsilon
    from fedpara_edge.privacy.ledger import open_privacy_ledger

    return opened.enter_context(open_privacy_ledger(folder.path / "privacy", epsilon))


def read_rounds(path: Path) -> dict[int, int]:
    """Round of the weights that each device has, of a file of them; empty, so that they get everything, without one."""
    with suppress(OSError, ValueError, TypeError, AttributeError, OverflowError):
        found = strict_json(read_text(path))
        return {int(node): int(round) for node, round in found.items()}
    return {}
