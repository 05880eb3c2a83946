"""A plan: which federations to simulate, as a TOML file says it.

    name            of the plan
    rounds          of each federation whose arm does not say otherwise
    seeds           list; each arm is run once for each. Decides clients, initial weights, participants, order of rows
    participants    clients drawn for each round; all where it is left out
    evaluate_every  rounds; the last is always evaluated
    target          accuracy whose bytes the report compares
    reference       arm that the report compares with; where it is left out "dense", or else the first, of those that
                    are not local_only
    [data]          `data.DataPlan`; a relative path counts from the plan's folder
    [model]         `fedpara_edge.formats.recipe.Recipe`, but for what [train] and the seeds decide
    [train]         `TrainPlan`
    [aggregate]     `AggregatePlan`
    [arms.NAME]     one table for each federation to compare: `model.…`, `train.…` and `aggregate.…` set keys of those
                    three tables anew for this arm, `rounds` the setting of that name, and `local_only = true` has
                    every client train on its own

All arms of a plan see the same clients with the same rows and the same participants in each round. Nothing is trained
before the whole plan was found good.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from device_runtime.config import TrainConfig
from device_runtime.engines.registry import ENGINES
from device_runtime.schedule import Schedule, Shape
from fedpara_edge.aggregation import AggregateConfig
from fedpara_edge.algorithms import CLIENT, Weighting, find_client
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import InputError, brief
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.simulation.data.federation import DataPlan
from fedpara_edge.simulation.plan.tables import check_keys, make

Tables = Mapping[str, Any]
Made = TypeVar("Made")

MAX_SEED = 2**32 - 1
ARM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,59}")
SETTINGS = ("name", "rounds", "seeds", "participants", "evaluate_every", "target", "reference")
PARTS = ("train", "model", "aggregate")
OWN_SERVER = tuple(name for name, kind in CLIENT.items() if kind.paired)
"""Client algorithms that need the server's of the same name, and the other way round."""
NAMES_OF_CONFIG = {"learning_rate": "lr", "round_decay": "lr_decay", "drop_every_epochs": "drop_every"}


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """The [train] table: what `fedpara-edge train` is told.

    Args:
        epochs: local epochs.
        batch_size: rows in a step.
        lr: learning rate.
        schedule: of the learning rate within a round.
        warmup_steps: steps of linear warm-up.
        drop_every: epochs between drops of schedule steps.
        drop_factor: of each drop.
        lr_decay: factor on the learning rate for each round.
        clip_norm: largest norm of a gradient.
        drop_last: leave out the last, smaller batch of an epoch.
        algorithm: local algorithm.
        mu: of fedprox.
        alpha: of feddyn.
        codec: how updates are written.
        engine: that trains.

    Raises:
        InputError: a value is out of range or unknown; the message starts with its key.
    """

    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    schedule: Shape = "constant"
    warmup_steps: int = 0
    drop_every: int = 1
    drop_factor: float = 0.1
    lr_decay: float = 1.0
    clip_norm: float | None = None
    drop_last: bool = False
    algorithm: str = "fedavg"
    mu: float | None = None
    alpha: float | None = None
    codec: str = "float32"
    engine: str = "onnxruntime"

    def __post_init__(self) -> None:
        try:
            self.config(seed=0)
        except InputError as error:
            key, colon, rest = str(error).partition(":")
            raise InputError(f"{NAMES_OF_CONFIG.get(key, key)}{colon}{rest}") from error
        _check_codec("codec", self.codec)
        if self.engine not in ENGINES:
            raise InputError(f"engine: expected one of {', '.join(ENGINES)}, found {self.engine!r}")

    def config(self, *, seed: int) -> TrainConfig:
        """What a device is told.

        Args:
            seed: of the order of rows and of dropout on this device.
        """
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.lr,
            schedule=Schedule(
                shape=self.schedule,
                warmup_steps=self.warmup_steps,
                drop_every_epochs=self.drop_every,
                drop_factor=self.drop_factor,
                round_decay=self.lr_decay,
            ),
            seed=seed,
            drop_last=self.drop_last,
            clip_norm=self.clip_norm,
            algorithm=find_client(self.algorithm, {"mu": self.mu, "alpha": self.alpha}),
        )


@dataclass(frozen=True, kw_only=True)
class AggregatePlan:
    """The [aggregate] table: what `fedpara-edge aggregate` is told.

    Args:
        algorithm: server algorithm.
        lr: its learning rate.
        momentum: of fedavgm.
        beta1: of fedadam, fedyogi and fedadagrad.
        beta2: of fedadam and fedyogi.
        tau: of the same three.
        alpha: of feddyn.
        weighting: of the devices: by examples, or equal; None for the algorithm's own.
        merge: the mean of the factors, or the factors refitted to the mean of the weights.
        downlink_codec: how the change of the weights is written for devices that have the earlier ones; float32 for
            whole weights.
        snapshot_every: rounds between whole weights for devices that have none or old ones; 0 for whole weights of
            every round. Only with another downlink_codec than float32.

    Raises:
        InputError: a value is out of range or unknown; the message starts with its key.
    """

    algorithm: str = "fedavg"
    lr: float | None = None
    momentum: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    tau: float | None = None
    alpha: float | None = None
    weighting: Weighting | None = None
    merge: Literal["mean", "refit"] = "mean"
    downlink_codec: str = "float32"
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        _check_codec("downlink_codec", self.downlink_codec)
        self.config(clients=1)
        if self.snapshot_every < 0:
            raise InputError(f"snapshot_every: expected an integer of at least 0, found {self.snapshot_every}")
        if self.snapshot_every and not self.sends_changes:
            raise InputError(
                f"snapshot_every: expected with another downlink_codec than float32, found {self.snapshot_every}; "
                "whole weights are sent in every round"
            )

    @property
    def sends_changes(self) -> bool:
        """Whether devices get changes of the weights instead of whole weights."""
        return self.downlink_codec != "float32"

    def config(self, *, clients: int) -> AggregateConfig:
        """How the server aggregates a round.

        Args:
            clients: Number of all devices.
        """
        return AggregateConfig(
            algorithm=self.algorithm,
            lr=self.lr,
            momentum=self.momentum,
            beta1=self.beta1,
            beta2=self.beta2,
            tau=self.tau,
            alpha=self.alpha,
            clients=clients if self.algorithm in OWN_SERVER else None,
            weighting=self.weighting,
            merge=self.merge,
            downlink_codec=self.downlink_codec if self.sends_changes else None,
        )

    @property
    def effective_weighting(self) -> Weighting:
        """The weighting of the devices, the algorithm's own where the plan asks for none."""
        return self.config(clients=1).effective_weighting


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One federation of the plan.

    Args:
        name: of the arm.
        rounds: of the federation.
        model: what its bundle is made of, but for the seed.
        train: what its devices do.
        aggregate: what its server does.
        local_only: whether there is no server: every client trains on its own from the common start.

    Raises:
        InputError: the parts don't go together; the message starts with a key.
    """

    name: str
    rounds: int
    model: Recipe
    train: TrainPlan
    aggregate: AggregatePlan
    local_only: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"rounds: expected an integer of at least 1, found {self.rounds}")
        local, server = self.train.algorithm, self.aggregate.algorithm
        if local != server and {local, server} & set(OWN_SERVER):
            one = local if local in OWN_SERVER else server
            raise InputError(
                f"train.algorithm: expected {one} with aggregate.algorithm {one} and only then, found {local} with "
                f"{server}"
            )
        if local == "feddyn":
            alpha = self.train.config(seed=0).algorithm.to_json()["alpha"]
            of_server = self.aggregate.config(clients=1).server_algorithm.options()["alpha"]
            if alpha != of_server:
                raise InputError(f"train.alpha: expected aggregate.alpha, {of_server}, found {alpha}")
        if self.local_only and (local, server) != ("fedavg", "fedavg"):
            raise InputError(
                f"local_only: expected with algorithm fedavg, found {local} and {server}: nothing is aggregated"
            )

    @property
    def is_personal(self) -> bool:
        """Whether every client has a model of its own."""
        return self.local_only or self.model.kind == "pfedpara" or bool(self.model.personal)

    @property
    def algorithm(self) -> str:
        """Local and server algorithm in one word, such as `fedprox+fedadam`."""
        names = dict.fromkeys((self.train.algorithm, self.aggregate.algorithm))
        return "+".join(name for name in names if name != "fedavg") or "fedavg"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole plan; the fields are described in the module.

    Raises:
        InputError: a value is out of range; the message starts with its key.
    """

    name: str
    rounds: int
    arms: tuple[Arm, ...]
    data: DataPlan
    seeds: tuple[int, ...] = (0,)
    participants: int | None = None
    evaluate_every: int = 1
    target: float | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise InputError(f"name: expected printable characters, found {self.name!r}")
        for name in ("rounds", "participants", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: expected an integer of at least 1, found {value}")
        in_range = all(0 <= seed <= MAX_SEED for seed in self.seeds)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not in_range:
            raise InputError(f"seeds: expected different integers from 0 to {MAX_SEED}, found {list(self.seeds)}")
        if self.target is not None and not 0 < self.target < 1:
            raise InputError(f"target: expected an accuracy between 0 and 1, found {self.target}")
        if not self.arms:
            raise InputError("arms: expected at least one table [arms.NAME], found none")
        names = [arm.name for arm in self.arms]
        if self.reference is not None and self.reference not in names:
            raise InputError(f"reference: expected one of the arms {', '.join(names)}, found {self.reference!r}")
        if self.data.test is None and not self.data.test_share:
            raise InputError(
                "data.test: expected a common test set or a test_share above 0, found neither; nothing could be "
                "evaluated"
            )

    @property
    def evaluated_on(self) -> Literal["common", "own"]:
        """On which examples accuracy is measured, for all arms alike: the common test set, or each client's own share.

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
            InputError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise InputError(f"arm {name!r}: expected one of {', '.join(arm.name for arm in self.arms)}")


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a plan, as they are in the file.

    Raises:
        InputError: it can't be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a plan, found {error.strerror}; check the path") from error
    except ValueError as error:
        raise InputError(f"{path}: expected a plan in TOML, found {error}") from error


def read_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        InputError: it can't be read, or a key is unknown, missing or of no good value; the message names file and key.
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
    check_keys(tables, (*SETTINGS, "data", *PARTS, "arms"))
    for name in ("data", *PARTS, "arms"):
        _check_table(name, tables.get(name, {}))
    with _prefixing("data."):
        data = make(DataPlan, tables.get("data", {}))
    arms = tuple(_arm(name, table, tables, folder) for name, table in tables.get("arms", {}).items())
    settings = {name: tables[name] for name in SETTINGS if name in tables}
    return make(Plan, settings, given={"arms": arms, "data": replace(data, path=folder / data.path)})


def _arm(name: str, table: Any, tables: Tables, folder: Path) -> Arm:
    where = f"arms.{name}"
    if not ARM_NAME.fullmatch(name):
        raise InputError(f"{where}: expected a name of up to 60 letters, digits, '_', '-', '+' and '.', found {name!r}")
    _check_table(where, table)
    with _prefixing(f"{where}."):
        check_keys(table, ("local_only", "rounds", *PARTS))
        for part in PARTS:
            _check_table(part, table.get(part, {}))

    def made(kind: type[Made], name: str, given: Tables | None = None) -> Made:
        own = table.get(name, {})
        try:
            return make(kind, {**tables.get(name, {}), **own}, given=given)
        except InputError as error:
            key = str(error).partition(":")[0]
            raise InputError(f"{where}.{name}.{error}" if key in own else f"{name}.{error}") from error

    train = made(TrainPlan, "train")
    given = {"batch_size": train.batch_size, "engines": (train.engine,), "seed": 0}
    model = made(Recipe, "model", given)
    rounds = tables.get("rounds")
    if type(rounds) is not int or rounds < 1:
        rounds = 1  # of which the plan complains, not each arm
    settings = {"rounds": rounds, **{key: value for key, value in table.items() if key not in PARTS}}
    parts = {"train": train, "aggregate": made(AggregatePlan, "aggregate"), "model": _beside(folder, model)}
    with _prefixing(f"{where}: "):
        return make(Arm, settings, given={"name": name, **parts})


def _beside(folder: Path, model: Recipe) -> Recipe:
    """The recipe with its files where they are, seen from the plan."""
    if model.pretrained is not None:
        model = replace(model, pretrained=folder / model.pretrained)
    where, _, factory = model.name.rpartition(":")
    return replace(model, name=f"{folder / where}:{factory}") if where.endswith(".py") else model


def _check_codec(key: str, text: str) -> None:
    with _prefixing(f"{key}: "):
        find_encoder(text)


def _check_table(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{key}: expected a table, found {value!r}")


@contextmanager
def _prefixing(prefix: str) -> Iterator[None]:
    """Have an error begin with where it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}{error}") from error
