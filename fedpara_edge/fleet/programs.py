"""The programs of a fleet on this machine, as Flower's commands take them: a SuperLink, SuperNodes and a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpara_edge.errors import FedparaError, brief_text
from fedpara_edge.fleet.bells import Bells, Place, hang
from fedpara_edge.fleet.forks import Forks
from fedpara_edge.fleet.keys import make_node_key
from fedpara_edge.fleet.ports import EVERYWHERE, LOOPBACK, answers
from fedpara_edge.fleet.replaced import ring_in_supernode, wait_in_superexec
from fedpara_edge.fleet.settings import NodeConfig, to_flower
from fedpara_edge.serving.certificates import AUTHORITY, CERTIFICATE, KEY, keep_certificates
from fedpara_edge.storage.tomlfile import toml_text

CONNECTION = "fleet"
"""Name of the connection in Flower's configuration."""
START_SECONDS = 60.0
POLL_SECONDS = 0.05


class Programs:
    """The programs of a fleet.

    A SuperExec runs tasks: one for the SuperLink, whose tasks are ServerApps, and one for each SuperNode.

    Args:
        forks: Forks to start them as.
        local: Folder for keys, configuration and the state of the nodes.
        ports: Port of the SuperLink, and those of the nodes here.
        secure: Whether to use TLS, and to let nodes with known keys in alone.
        host: Name or address by which nodes elsewhere reach this machine; empty for nodes here alone.
        interrupted: Function that tells whether to end.
    """

    def __init__(
        self,
        forks: Forks,
        local: Path,
        ports: Sequence[int],
        *,
        secure: bool = False,
        host: str = "",
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._interrupted = interrupted
        self._forks, self._local, self._secure, self._host = forks, local, secure, host
        self._port, *self._node_ports = ports
        self._keys = local / "keys"
        self._trusting = ("--root-certificates", str(self._keys / AUTHORITY)) if secure else ("--insecure",)
        self._needed: dict[str, int] = {}
        self._nodes: dict[str, int] = {}

    def start(self, data: Sequence[Path], *, remote: int = 0) -> None:
        """Start the SuperLink, and a SuperNode here for each of some data.

        Args:
            data: Data of the nodes here.
            remote: Number of nodes elsewhere, which get keys where these are needed.

        Raises:
            FedparaError: The SuperLink does not start, or refuses a key.
        """
        self._write_connection()
        hang(bells := Bells(len(data), others=remote > 0))
        self._needed["superlink"] = self._forks.start(
            "flower-superlink",
            *self._server_options(),
            *("--isolation", "process", "--host", EVERYWHERE if self._host else LOOPBACK, "--port", str(self._port)),
            "--disable-runtime-dependency-installation",
            log="superlink",
        )
        self._needed["server"] = _start_superexec(self._forks, self._port, self._trusting, log="server")
        deadline = time.monotonic() + START_SECONDS
        while not answers(self._port):
            self.check()
            if time.monotonic() > deadline:
                raise FedparaError(f"{self._log('superlink')}: expected a SuperLink that answers, found none")
            time.sleep(POLL_SECONDS)
        for number, path in enumerate(data):
            name = f"node-{number}"
            config = NodeConfig(data=path, state=self._local / "nodes" / name, threads=1)
            address = f"{LOOPBACK}:{self._port}"
            trusting = [*self._trusting, *self._key_of(name)]
            port = self._node_ports[number]
            place = Place(bells, number, is_told=True)
            self._nodes[name] = start_node(self._forks, address, config, port, trusting, log=name, place=place)[0]
        for number in range(remote):
            self._key_of(f"device-{number}")

    def run(self, app: Path, settings: Mapping[str, Any]) -> int:
        """Start the rounds of a Flower app; the process that ends when they do."""
        pairs = _pairs(settings)
        return self._forks.start("flwr", "run", str(app), CONNECTION, "--run-config", pairs, "--stream", log="run")

    def check(self) -> list[str]:
        """Names of the nodes that ended since the last time.

        Raises:
            FedparaError: A program ended that is needed to go on.
            KeyboardInterrupt: Interrupted.
        """
        if self._interrupted():
            raise KeyboardInterrupt
        for name, pid in self._needed.items():
            if self._forks.ended(pid) is not None:
                raise FedparaError(
                    f"{self._log(name)}: expected a program that runs, found that it ended; the log tells why, and the "
                    "same command goes on"
                )
        ended = [name for name, pid in self._nodes.items() if self._forks.ended(pid) is not None]
        for name in ended:
            del self._nodes[name]
        return ended

    def record(self) -> tuple[str, str]:
        """Status of the run in Flower's record, and its details."""
        listing = self._flwr("list", CONNECTION, "--format", "json", log="record")
        try:
            run = json.JSONDecoder().raw_decode(listing[listing.index("{") :])[0]["runs"][0]
            return str(run["status"]), str(run["status-details"])
        except (ValueError, KeyError, IndexError, TypeError):
            return "none", ""

    def _key_of(self, name: str) -> Sequence[str]:
        """Options of a node for its key, which the SuperLink then knows; none where no keys are needed.

        Raises:
            FedparaError: The SuperLink refuses the key.
        """
        if not self._secure:
            return ()
        public = make_node_key(self._keys / name)
        if "registered" not in (said := self._flwr("supernode", "register", str(public), CONNECTION, log="register")):
            raise FedparaError(f"{public}: expected a SuperLink that takes the key, found {brief_text(said)}")
        return ("--auth-supernode-private-key", str(self._keys / name))

    def _server_options(self) -> Sequence[str]:
        if not self._secure:
            return ("--insecure",)
        hosts = dict.fromkeys(("localhost", LOOPBACK, self._host or LOOPBACK))
        keep_certificates(self._keys, tuple(hosts), authority="fedpara-edge fleet")
        files = {"ca-certfile": AUTHORITY, "certfile": CERTIFICATE, "keyfile": KEY}
        options = [(f"--ssl-{name}", str(self._keys / file)) for name, file in files.items()]
        return [part for pair in options for part in pair] + ["--enable-supernode-auth"]

    def _flwr(self, *arguments: str, log: str) -> str:
        """Run a command of `flwr` to its end; what it printed."""
        pid = self._forks.start("flwr", *arguments, log=log)
        while self._forks.ended(pid) is None:
            if self._interrupted():
                raise KeyboardInterrupt
            time.sleep(POLL_SECONDS)
        return self._log(log).read_text(encoding="utf-8", errors="replace")

    def _log(self, name: str) -> Path:
        return self._local / "logs" / f"{name}.log"

    def _write_connection(self) -> None:
        trust = {"root-certificates": str(self._keys / AUTHORITY)} if self._secure else {"insecure": True}
        connection = {"address": f"{LOOPBACK}:{self._port}", **trust}
        text = toml_text({"superlink": {"default": CONNECTION, CONNECTION: connection}})
        (self._local / "flower" / "config.toml").write_text(text, encoding="utf-8")


def start_node(
    forks: Forks, address: str, config: NodeConfig, port: int, options: Sequence[str], *, log: str, place: Place
) -> tuple[int, int]:
    """Start a SuperNode, and the SuperExec that runs its tasks; their processes.

    Args:
        forks: Forks to start them as.
        address: Address of the SuperLink.
        config: Settings of the node.
        port: Port for its own use.
        options: Options of `flower-supernode` for what to trust and which key to use.
        log: Name of the file for what they print.
        place: Place among the bells.
    """
    node = forks.start(
        "flower-supernode",
        *options,
        *("--superlink", address, "--isolation", "process", "--host", LOOPBACK, "--port", str(port)),
        *("--node-config", _pairs(to_flower(config))),
        log=log,
        before=lambda: ring_in_supernode(place),
    )
    return node, _start_superexec(forks, port, ("--insecure",), log=log, place=place)


def _start_superexec(forks: Forks, port: int, options: Sequence[str], *, log: str, place: Place | None = None) -> int:
    def begin() -> None:
        answers(port, seconds=START_SECONDS)
        if place is not None:
            wait_in_superexec(place)

    return forks.start(
        "flower-superexec",
        *options,
        *("--runtime-api-address", f"{LOOPBACK}:{port}"),
        log=log,
        before=begin,
        after_task=(lambda: None) if place is None else place.node.ring,
    )


def _pairs(settings: Mapping[str, Any]) -> str:
    """Settings as `--run-config` and `--node-config` take them."""
    return " ".join(
        f"{key}={value if isinstance(value, int | float) else _quoted(value)}" for key, value in settings.items()
    )


def _quoted(value: Any) -> str:
    return json.dumps(str(value), ensure_ascii=False)
