"""A plan: the federations to simulate, as a TOML file states them.

    name            name of the plan
    rounds          rounds of each federation whose arm has none of its own
    seeds           list of seeds, for each of which every arm is run; a seed decides clients, initial weights,
                    participants and the order of rows
    participants    clients drawn for each round; all where it is left out
    evaluate_every  rounds between evaluations; the last round is always evaluated
    target          accuracy whose bytes the report compares
    reference       arm that the report compares with; where it is left out "dense", or else the first, of those that
                    are not local_only
    [data]          `data.DataPlan`; a relative path counts from the plan's folder
    [model]         `fedpara_edge.formats.recipe.Recipe`, but for what [train] and the seeds decide
    [train]         `TrainPlan`
    [aggregate]     `AggregatePlan`
    [devices]       `devices.DevicesPlan`; may be left out
    [arms.NAME]     one table for each federation to compare: `model.…`, `train.…` and `aggregate.…` replace keys of
                    those three tables in this arm, `rounds` the setting of that name, and with `local_only = true`
                    every client trains on its own

All arms of a plan see the same clients with the same rows, the same participants in each round and the same devices.
Nothing is trained
before the whole plan was found good.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from device_runtime.config import TrainCall
from device_runtime.engines.registry import ENGINES
from fedpara_edge.aggregation.config import COUNTING, AggregateConfig
from fedpara_edge.algorithms import ClientAlgorithm, ServerAlgorithm, check_halves
from fedpara_edge.codecs.float32 import Float32
from fedpara_edge.errors import InputError, brief
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.options import bind, check, check_keys, declared, option
from fedpara_edge.simulation.data.federation import DataPlan
from fedpara_edge.simulation.plan.devices import DevicesPlan
from fedpara_edge.storage.tomlfile import read_toml

Tables = Mapping[str, Any]
ALL_THERE = DevicesPlan()
Made = TypeVar("Made")

ARM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,59}")
PARTS = ("train", "model", "aggregate")
UNPLANNED = ("seed", "threads", "tune", "tunable", "save_seconds", "save_steps", "clients", "min_updates", "strict")
"""Options of the commands that a plan decides otherwise, or has no use for."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan(TrainCall):
    """The [train] table: the options of `fedpara-edge train`, but for `UNPLANNED`.

    Raises:
        InputError: A value is out of its range; the error has its key.
    """

    engine: str = option("onnxruntime", choices=tuple(ENGINES), help="Engine that trains.")


@dataclass(frozen=True, kw_only=True)
class AggregatePlan(AggregateConfig):
    """The [aggregate] table: the options of `fedpara-edge aggregate`, but for `UNPLANNED`.

    Args:
        snapshot_every: Rounds between whole weights for devices that have none or old ones; 0 for whole weights of
            every round. Only with a downlink_codec other than float32.

    Raises:
        InputError: A value is out of its range; the error has its key.
    """

    snapshot_every: int = option(0, minimum=0, help="Rounds between whole weights, with a downlink codec.")

    def __post_init__(self) -> None:
        check(self)
        self.config(clients=1)
        if self.snapshot_every and not self.sends_changes:
            raise InputError(
                f"expected with another downlink_codec than float32, found {self.snapshot_every}; whole weights are "
                "sent in every round",
                key="snapshot_every",
            )

    @property
    def sends_changes(self) -> bool:
        """Whether devices get changes of the weights instead of whole weights."""
        return self.downlink_codec not in (None, "float32")

    def config(self, *, clients: int) -> AggregateConfig:
        """The configuration of the server.

        Args:
            clients: Number of all clients.
        """
        values = {name: getattr(self, name) for name in declared(AggregateConfig)}
        needed = self.algorithm.partition(":")[0] in COUNTING
        codec = self.downlink_codec if self.sends_changes else None
        return AggregateConfig(**{**values, "clients": clients if needed else None, "downlink_codec": codec})

    @property
    def server_algorithm(self) -> ServerAlgorithm:
        """The server algorithm, as if there were one client where it needs their number."""
        return self.config(clients=1).server_algorithm


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A federation of the plan.

    Args:
        name: Name of the arm.
        rounds: Rounds of the federation.
        model: Recipe of its bundle, but for the seed.
        train: Options of its devices.
        aggregate: Options of its server.
        local_only: Whether there is no server, and every client trains on its own from the common start.

    Raises:
        InputError: The parts don't go together; the error has a key.
    """

    name: str
    rounds: int = option(minimum=1, help="Rounds of the federation.")
    model: Recipe
    train: TrainPlan
    aggregate: AggregatePlan
    local_only: bool = option(False, help="Have every client train on its own.")

    def __post_init__(self) -> None:
        check(self)
        of_device, of_server = self.train.client_algorithm, self.aggregate.server_algorithm
        local, server = of_device.name, of_server.name
        try:
            check_halves(of_device, of_server)
        except InputError as error:
            raise error.about("train.algorithm") from error
        if self.local_only and (local, server) != ("fedavg", "fedavg"):
            raise InputError(
                f"expected with algorithm fedavg, found {local} and {server}: nothing is aggregated", key="local_only"
            )

        if self.model.kind == "update":
            self._check_update()

    def _check_update(self) -> None:
        client, server = self.train.client_algorithm, self.aggregate.server_algorithm
        refused = {
            "train": None if client.group is None else client.name,
            "aggregate": server.name if server.groups and not server.restarts else None,
        }
        for key, found in refused.items():
            if found is not None:
                raise InputError(
                    "expected fedavg, fedavgm or fedprox with model.kind update, as nothing is kept of factors that "
                    f"have other directions each time, found {found}",
                    key=f"{key}.algorithm",
                )
        if self.local_only and self.model.reset_every not in (None, 1):
            raise InputError(
                f"expected 1 with local_only, found {self.model.reset_every}; leave it out", key="model.reset_every"
            )

    @property
    def sends_changes(self) -> bool:
        """Whether devices get changes of the weights: of updates in any case, as whole weights are dense."""
        return self.aggregate.sends_changes or self.model.kind == "update"

    def server(self, *, clients: int) -> AggregateConfig:
        """Configuration of the server.

        Args:
            clients: Number of all clients.
        """
        config = self.aggregate.config(clients=clients)
        if self.sends_changes and config.downlink_codec is None:
            return replace(config, downlink_codec=Float32.name)
        return config

    @property
    def is_personal(self) -> bool:
        """Whether every client has a model of its own."""
        model = self.model
        return self.local_only or model.kind == "pfedpara" or model.batchnorm == "local" or bool(model.personal)

    @property
    def algorithm(self) -> str:
        """Local and server algorithm in one word, such as `fedprox+fedadam`."""
        return algorithm_of(self.train.client_algorithm, self.aggregate.server_algorithm)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole plan; the fields are described in the module.

    Raises:
        InputError: A value is out of range; the error has its key.
    """

    name: str = option(help="Name of the plan.")
    rounds: int = option(minimum=1, help="Rounds of each federation whose arm does not say otherwise.")
    arms: tuple[Arm, ...]
    data: DataPlan
    devices: DevicesPlan = ALL_THERE
    seeds: tuple[int, ...] = option((0,), minimum=0, maximum=2**32 - 1, help="Seeds; each arm is run once for each.")
    participants: int | None = option(None, minimum=1, unset="all", help="Clients drawn for each round.")
    evaluate_every: int = option(1, minimum=1, help="Rounds between evaluations; the last round is always evaluated.")
    target: float | None = option(None, above=0, below=1, help="Accuracy whose bytes the report compares.")
    reference: str | None = option(None, help="Arm that the report compares with.")

    def __post_init__(self) -> None:
        check(self)
        if not self.name or not self.name.isprintable():
            raise InputError(f"expected printable characters, found {self.name!r}", key="name")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"expected different integers, at least one, found {list(self.seeds)}", key="seeds")
        if not self.arms:
            raise InputError("expected at least one table [arms.NAME], found none", key="arms")
        names = [arm.name for arm in self.arms]
        if self.reference is not None and self.reference not in names:
            raise InputError(f"expected one of the arms {', '.join(names)}, found {self.reference!r}", key="reference")
        if self.data.test is None and not self.data.test_share:
            raise InputError(
                "expected a common test set or a test_share above 0, found neither; nothing could be evaluated",
                key="data.test",
            )

    @property
    def evaluated_on(self) -> Literal["common", "own"]:
        """The examples of every evaluation, in all arms alike: the common test set, or each client's own share.

        Own shares are taken where they are all there is, and where an arm has models of the clients' own.
        """
        if self.data.test is None:
            return "own"
        return "own" if self.data.test_share and any(arm.is_personal for arm in self.arms) else "common"

    def is_evaluated(self, number: int, *, last: int) -> bool:
        """Whether weights after round `number` (from 1 on) are evaluated, where `last` is the last round."""
        return number % self.evaluate_every == 0 or number == last

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            InputError: There is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise InputError(f"arm {name!r}: expected one of {', '.join(arm.name for arm in self.arms)}")


def algorithm_of(client: ClientAlgorithm, server: ServerAlgorithm) -> str:
    """Local and server algorithm in one word, such as `fedprox+fedadam`."""
    names = dict.fromkeys((client.name, server.name))
    return "+".join(name for name in names if name != "fedavg") or "fedavg"


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a plan, as they are in the file.

    Raises:
        InputError: The file can't be read, or is no TOML.
    """
    try:
        return read_toml(path)
    except OSError as error:
        raise InputError(f"{path}: expected a plan, found {error.strerror}; check the path") from error
    except ValueError as error:
        raise InputError(f"{path}: expected a plan in TOML, found {error}") from error


def read_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        InputError: The file can't be read, or a key is unknown, missing or of no good value; the message names both.
    """
    tables = read_tables(path)
    try:
        return _plan(tables, path.parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def first_difference(before: Tables, now: Tables) -> str | None:
    """The first value in which two plans differ, in the order of the second, by its dotted key; None if in none.

    >>> first_difference({"rounds": 3, "train": {"lr": 0.1}}, {"rounds": 3, "train": {"lr": 0.2}})
    'train.lr: expected 0.1, found 0.2'
    >>> first_difference({"rounds": 3}, {})
    'rounds: expected 3, found no such key'
    """
    one, other = dict(_flat(before)), dict(_flat(now))
    for key in (*other, *one):
        if key not in one or key not in other or one[key] != other[key]:
            expected, found = (brief(of[key]) if key in of else "no such key" for of in (one, other))
            return f"{key}: expected {expected}, found {found}"
    return None


def _flat(tables: Tables, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plan(tables: Tables, folder: Path) -> Plan:
    settings = list(declared(Plan))
    check_keys(tables, (*settings, "data", "devices", *PARTS, "arms"))
    common = {name: _table(tables, name) for name in ("data", "devices", *PARTS, "arms")}
    with _under("data"):
        data = bind(DataPlan, common["data"])
    with _under("devices"):
        devices = bind(DevicesPlan, common["devices"])
    arms = tuple(_arm(name, tables, common, folder) for name in common["arms"])
    own = {name: tables[name] for name in settings if name in tables}
    return bind(Plan, own, given={"arms": arms, "data": replace(data, path=folder / data.path), "devices": devices})


def _arm(name: str, tables: Tables, common: Mapping[str, Tables], folder: Path) -> Arm:
    where = f"arms.{name}"
    if not ARM_NAME.fullmatch(name):
        raise InputError(
            f"expected a name of up to 60 letters, digits, '_', '-', '+' and '.', found {name!r}", key=where
        )
    with _under("arms"):
        table = _table(common["arms"], name)
    with _under(where):
        check_keys(table, ("local_only", "rounds", *PARTS))
        changed = {part: _table(table, part) for part in PARTS}

    def made(kind: type[Made], part: str, given: Tables | None = None) -> Made:
        try:
            return bind(kind, {**common[part], **changed[part]}, given=given, hidden=UNPLANNED)
        except InputError as error:
            found = error.under(part)
            raise (found.under(where) if error.key in changed[part] else found) from error

    train = made(TrainPlan, "train")
    given = {"batch_size": train.batch_size, "engines": (train.engine,), "seed": 0}
    model = made(Recipe, "model", given)
    rounds = tables.get("rounds")
    if type(rounds) is not int or rounds < 1:
        rounds = 1  # of which the plan complains, not each arm
    settings = {"rounds": rounds, **{key: value for key, value in table.items() if key not in PARTS}}
    parts = {"train": train, "aggregate": made(AggregatePlan, "aggregate"), "model": _beside(folder, model)}
    with _under(where):
        return bind(Arm, settings, given={"name": name, **parts})


def _beside(folder: Path, model: Recipe) -> Recipe:
    """The recipe with its files where they are, seen from the plan."""
    if model.pretrained is not None:
        model = replace(model, pretrained=folder / model.pretrained)
    if model.example is not None:
        model = replace(model, example=folder / model.example)
    where, _, factory = model.name.rpartition(":")
    return replace(model, name=f"{folder / where}:{factory}") if where.endswith(".py") else model


def _table(tables: Tables, key: str) -> Tables:
    """A table among others; empty where it is left out."""
    table = tables.get(key, {})
    if not isinstance(table, dict):
        raise InputError(f"expected a table, found {table!r}", key=key)
    return table


@contextmanager
def _under(prefix: str) -> Iterator[None]:
    """Have the key of an error say in which table it is."""
    try:
        yield
    except InputError as error:
        raise error.under(prefix) from error
