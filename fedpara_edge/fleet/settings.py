"""What a fleet is told: the settings of the Flower app, and those that each node has for itself.

Both are flat tables of numbers and strings, which Flower takes as `--run-config` and `--node-config`. It spells keys
with dashes, and has no word for a value that is not there, so that an empty string stands for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

from device_runtime.engines.registry import ENGINES, MAX_THREADS
from device_runtime.sources import Reading
from fedpara_edge.options import bind, check, declared, option

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Settings of the server, as the Flower app has them.

    Args:
        bundle: Bundle folder.
        plan: Plan file.
        run: Run folder, as `simulate` has one; whatever is needed to go on is there.
        arm: Arm of the plan.
        nodes: Nodes to wait for before the first round.
        wait_seconds: Time to wait for them.
        round_seconds: Time that the devices of a round get.
        at_once: Devices that train at a time, at most.
        min_updates: Valid updates below which a round fails.
        test: Data to evaluate the weights on; None to evaluate nothing.
        allow: TOML file with the keys of clients, whose signed updates alone count; None for all updates.

    Raises:
        InputError: A value is out of its range.
    """

    bundle: Path = option(help="Bundle folder.")
    plan: Path = option(help="Plan file.")
    run: Path = option(help="Run folder.")
    arm: str = option(help="Arm of the plan.")
    nodes: int = option(2, minimum=1, help="Nodes to wait for before the first round.")
    wait_seconds: float = option(300.0, above=0, help="Time to wait for them.")
    round_seconds: float = option(3600.0, above=0, help="Time that the devices of a round get.")
    at_once: int = option(100, minimum=1, help="Devices that train at a time.")
    min_updates: int = option(1, minimum=1, help="Valid updates below which a round fails.")
    test: Path | None = option(
        None, metavar="PATH", unset="no evaluation", help="Data to evaluate the weights of each round on."
    )
    allow: Path | None = option(
        None, metavar="FILE", help="TOML file with keys of clients: signed updates alone count."
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class NodeConfig(Reading):
    """Settings of a device, with the options for reading its data among them.

    Args:
        data: Data file or folder.
        state: State folder, made if it is missing; the bundle and the weights that came are kept in it too.
        bundle: Bundle folder that the device has already; None for the one that the server sends.
        key: Private key to sign updates with; None for unsigned ones.
        client: Name of the device in its updates; None for the one in the state folder.
        engine: Engine that trains; None for the plan's.
        threads: Threads of the engine; None for one per core.

    Raises:
        InputError: A value is out of its range.
    """

    data: Path = option(help="Data file or folder.")
    state: Path = option(help="State folder.")
    bundle: Path | None = option(
        None, metavar="PATH", unset="the one that the server sends", help="Bundle folder that the device has."
    )
    key: Path | None = option(None, metavar="FILE", help="Private key to sign updates with.")
    client: str | None = option(None, unset="kept in the state folder", help="Name of the device in its updates.")
    engine: str | None = option(None, choices=("auto", *ENGINES), unset="the plan's", help="Engine that trains.")
    threads: int | None = option(
        None, minimum=1, maximum=MAX_THREADS, unset="one per core", help="Threads of the engine."
    )

    @property
    def reading(self) -> Reading:
        """The options for reading the data."""
        return Reading(**{name: getattr(self, name) for name in declared(Reading)})


def from_flower(kind: type[Settings], table: Mapping[str, Any]) -> Settings:
    """Settings from a table as Flower has it.

    Raises:
        InputError: A key is missing or unknown, or a value is out of its range.
    """
    known = declared(kind)
    values = {key.replace("-", "_"): value for key, value in table.items() if value != ""}
    typed = {
        name: value.split(",") if name in known and get_origin(known[name].kind) is tuple else value
        for name, value in values.items()
    }
    return bind(kind, typed)


def to_flower(settings: Any) -> dict[str, str | int | float]:
    """A table as Flower has it."""
    values = {name.replace("_", "-"): getattr(settings, name) for name in declared(type(settings))}
    return {name: value if isinstance(value, int | float) else _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    return "" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
