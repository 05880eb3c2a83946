"""A whole fleet on this machine: SuperLink and SuperNodes are started, the rounds run, and nothing stays behind.

Whether the rounds succeeded is what Flower's record says of the run, as `flwr run` ends well for failed ones too.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from device_runtime.interrupts import holding_interrupts
from fedpara_edge import errors
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.fleet.app import LOCAL, read_app
from fedpara_edge.fleet.federation import check_fit
from fedpara_edge.fleet.ports import EVERYWHERE, LOOPBACK, free_ports
from fedpara_edge.fleet.settings import FleetConfig
from fedpara_edge.fleet.switches import SWITCHES
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.simulation.data.clients import read_clients, write_clients
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.simulation.metrics import Event
from fedpara_edge.simulation.plan.plan import Plan, read_plan
from fedpara_edge.simulation.processes import environment
from fedpara_edge.storage.locking import hold

if TYPE_CHECKING:
    from fedpara_edge.fleet.forks import Forks
    from fedpara_edge.fleet.programs import Programs

POLL_SECONDS = 0.1
SUCCESS = "finished:completed"
_REASON = re.compile(r"\[([a-z_]+)\] (.*)", re.DOTALL)
"""Code and sentence in the details of a record."""

OnRound = Callable[[Event], None]
OnLine = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fleet has come to.

    Args:
        status: Status in Flower's record.
        rounds: Lines of the metrics about rounds.
        weights: Weights file after the last of them.
    """

    status: str
    rounds: Sequence[Event]
    weights: Path


def run_up(
    folder: Path,
    *,
    nodes: int,
    data: Sequence[Path] = (),
    port: int = 0,
    secure: bool = False,
    remote: int = 0,
    host: str = "",
    on_round: OnRound = lambda _: None,
    on_line: OnLine = lambda _: None,
) -> Outcome:
    """Run the rounds of a Flower app that are left, on this machine.

    Args:
        folder: The Flower app.
        nodes: Number of SuperNodes here.
        data: Data of each node; none for the clients of the plan.
        port: Port of the SuperLink; 0 for a free one.
        secure: Whether to use TLS, and to let nodes with known keys in alone.
        remote: Number of SuperNodes elsewhere to wait for.
        host: Name or address by which these reach this machine.
        on_round: Function that is called with the metrics of each round that is done.
        on_line: Function that is called with what goes wrong, a line each.

    Raises:
        InputError: The app, the plan, the data or the port does not fit.
        BusyError: Another process uses the app.
        FedparaError: The rounds failed; the kind is that of the reason.
        KeyboardInterrupt: Interrupted; the same call goes on.
    """
    if sys.platform == "win32":
        raise InputError(
            "fleet up: expected Linux or macOS, found Windows; start flower-superlink and flower-supernode"
        )
    config = read_app(folder)
    plan = read_plan(config.plan)
    arm = plan.arm(config.arm)
    check_fit(arm, open_bundle(config.bundle))
    ports = free_ports(nodes + 1, first=port, address=EVERYWHERE if remote else LOOPBACK)
    local = folder.absolute() / LOCAL
    for name in ("logs", "flower", "keys", "nodes"):
        (local / name).mkdir(parents=True, exist_ok=True)
    with hold(local / ".lock", folder=folder, kind="a fleet"):
        sources, test = _data(local, plan, nodes, data)
        settings = {"nodes": nodes + remote, **({} if config.test or test is None else {"test": test})}
        for log in (local / "logs").iterdir():
            log.unlink()
        with environment({**SWITCHES, "FLWR_HOME": str(local / "flower")}):
            from fedpara_edge.fleet.forks import running_forks
            from fedpara_edge.fleet.programs import Programs
            from fedpara_edge.fleet.server import SAID

            with holding_interrupts() as interrupted, running_forks(local / "logs") as forks:
                programs = Programs(
                    forks, local, ports, secure=secure, host=host if remote else "", interrupted=interrupted
                )
                told = _Told(local / "logs" / "run.log", SAID, on_line)
                programs.start(sources, remote=remote)
                if remote:
                    on_line(_invitation(host, ports[0], local / "keys" if secure else None, remote))
                run = programs.run(folder, settings)
                rounds = _watch(forks, programs, run, config, on_round, told)
                status, details = programs.record()
    if status != SUCCESS:
        raise _reason(local / "logs", status, details)
    done = RunFolder(config.run).job(arm.name, plan.seeds[0])
    return Outcome(status=status, rounds=rounds, weights=done.weights(len(rounds)))


class _Told:
    """What the server tells in its log.

    Args:
        log: File of the log.
        beginning: Beginning of the lines that are meant.
        on_line: Function that is called with each of them.
    """

    def __init__(self, log: Path, beginning: str, on_line: OnLine) -> None:
        self._log, self._beginning, self._read_bytes, self.say = log, beginning, 0, on_line

    def tell(self) -> None:
        """Call the function with the lines that are new."""
        content = self._log.read_bytes()[self._read_bytes :] if self._log.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            if line.startswith(self._beginning):
                self.say(line.removeprefix(self._beginning))


def _watch(
    forks: Forks, programs: Programs, run: int, config: FleetConfig, on_round: OnRound, told: _Told
) -> list[Event]:
    """Tell of what happens until the run has ended; the rounds."""
    shown = 0
    while True:
        has_ended = forks.ended(run) is not None
        for name in programs.check():
            told.say(f"{name}: its SuperNode ended")
        told.tell()
        rounds = _rounds(config)
        for event in rounds[shown:]:
            on_round(event)
        shown = len(rounds)
        if has_ended:
            return rounds
        time.sleep(POLL_SECONDS)


def _invitation(host: str, port: int, keys: Path | None, count: int) -> str:
    """What to type on the devices elsewhere."""
    line = f"fedpara-edge fleet node {host}:{port} --data DATA --state STATE"
    where = "on a device" if count == 1 else f"on each of {count} devices"
    if keys is None:
        return f"{where}: {line}"
    own = "device-0" if count == 1 else f"its own of device-0 to device-{count - 1}"
    return f"{where}, with ca.pem and {own} from {keys}: {line} --ca ca.pem --auth device-0"


def _rounds(config: FleetConfig) -> list[Event]:
    path = RunFolder(config.run).metrics
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["event"] == "round" and event["arm"] == config.arm]


def _reason(logs: Path, status: str, details: str) -> FedparaError:
    """The error that the server ended with, as far as Flower's record has it."""
    if found := _REASON.search(details):
        code, message = found.groups()
        kinds = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedparaError))
        error = next((kind for kind in kinds if kind.code == code), FedparaError)(message)
        error.code = code
        return error
    return FedparaError(
        f"{logs}: expected {SUCCESS} in Flower's record, found {status}; the logs there tell more, and the same "
        "command goes on"
    )


def _data(local: Path, plan: Plan, nodes: int, data: Sequence[Path]) -> tuple[list[Path], Path | None]:
    """Data of each node, and of the test if the plan has it."""
    if data:
        if len(data) != nodes:
            raise InputError(f"expected as many as nodes, {nodes}, found {len(data)}", key="data")
        for path in data:
            if not path.exists():
                raise InputError(f"{path}: expected data, found nothing; check the path", key="data")
        return [path.absolute() for path in data], None
    place = local / "data"
    write_clients(place, plan.data, plan.seeds[0])
    clients = read_clients(place)
    if len(clients.clients) < nodes:
        raise InputError(f"expected at most the {len(clients.clients)} clients of the plan, found {nodes}", key="nodes")
    return [
        clients.train(client.name) for client in clients.clients[:nodes]
    ], clients.common if clients.test_examples else None
