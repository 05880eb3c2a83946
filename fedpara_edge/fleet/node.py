"""A device's SuperNode, with all that it starts as forks of one process that has imported it.

A SuperLink that was restarted knows none of its nodes, and these go on asking it in vain. So whenever the server is
there again after it was not, the SuperNode is started anew; a training that is under way saves its progress first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from device_runtime.interrupts import holding_interrupts
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.fleet.bells import Bells, Place
from fedpara_edge.fleet.device import FLEET
from fedpara_edge.fleet.ports import answers, free_ports
from fedpara_edge.fleet.settings import NodeConfig
from fedpara_edge.fleet.switches import SWITCHES
from fedpara_edge.simulation.processes import environment
from fedpara_edge.storage.locking import hold

POLL_SECONDS = 1.0


def run_node(
    address: str,
    config: NodeConfig,
    *,
    ca: Path | None = None,
    auth: Path | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Train whenever the server calls, until this is interrupted.

    Args:
        address: Address of the SuperLink, `host:port`.
        config: Settings of the device.
        ca: Certificate of the authority that signed the SuperLink's; None for a connection without TLS.
        auth: Private key that the SuperLink knows; None for one that lets everybody in.
        on_start: Function that is called when all was found good.

    Raises:
        InputError: A file is missing, or the address is none.
        BusyError: Another process is the node of this state folder.
        FedparaError: The SuperNode ended.
        KeyboardInterrupt: Interrupted.
    """
    if sys.platform == "win32":
        raise InputError("fleet node: expected Linux or macOS, found Windows; start flower-supernode")
    for path, name in ((config.data, "data"), (ca, "ca"), (auth, "auth")):
        if path is not None and not path.exists():
            raise InputError(f"expected a file or folder, found nothing at {path}; check the path", key=name)
    host, _, number = address.rpartition(":")
    if not host or not number.isdecimal():
        raise InputError(f"{address}: expected HOST:PORT, found no port; add it")
    server = int(number)
    local = config.state.absolute() / FLEET
    for folder in (local, local / "logs", local / "flower"):
        folder.mkdir(parents=True, exist_ok=True)
    log = local / "logs" / "node.log"
    with hold(local / ".lock", folder=config.state, kind="the state folder of a node"):
        log.unlink(missing_ok=True)
        on_start()
        trust: Sequence[str] = ("--insecure",) if ca is None else ("--root-certificates", str(ca))
        key: Sequence[str] = () if auth is None else ("--auth-supernode-private-key", str(auth))
        with environment({**SWITCHES, "FLWR_HOME": str(local / "flower")}):
            from fedpara_edge.fleet.forks import running_forks
            from fedpara_edge.fleet.programs import start_node

            with holding_interrupts() as interrupted, running_forks(local / "logs") as forks:
                (port,) = free_ports(1)
                place = Place(Bells(1, others=True), 0, is_told=False)
                running: tuple[int, ...] = ()
                is_there = False
                while all(forks.ended(pid) is None for pid in running):
                    was_there, is_there = is_there, answers(server, host=host)
                    if not running or (is_there and not was_there):
                        forks.end(*running)
                        running = start_node(forks, address, config, port, (*trust, *key), log="node", place=place)
                    if interrupted():
                        raise KeyboardInterrupt
                    time.sleep(POLL_SECONDS)
    raise FedparaError(f"{log}: expected a SuperNode that runs, found that it ended; the log tells why")
