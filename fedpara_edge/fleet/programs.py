"""The programs of a fleet on this machine, as Flower's commands take them: a SuperLink, SuperNodes and a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpara_edge.errors import FedparaError
from fedpara_edge.fleet.forks import Forks
from fedpara_edge.fleet.keys import make_node_key
from fedpara_edge.fleet.ports import LOOPBACK, answers
from fedpara_edge.serving.certificates import AUTHORITY, CERTIFICATE, KEY, make_certificates

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
        ports: Port of the SuperLink, and those of the nodes.
        secure: Whether to use TLS, and to let nodes with known keys in alone.
    """

    def __init__(self, forks: Forks, local: Path, ports: Sequence[int], *, secure: bool) -> None:
        self._forks, self._local, self._secure = forks, local, secure
        self._port, *self._node_ports = ports
        self._keys = local / "keys"
        self._trusting = ("--root-certificates", str(self._keys / AUTHORITY)) if secure else ("--insecure",)
        self._needed: dict[str, int] = {}
        self._nodes: dict[str, int] = {}

    def start(self, data: Sequence[Path]) -> None:
        """Start the SuperLink, and a SuperNode for each of some data.

        Raises:
            FedparaError: The SuperLink does not start, or refuses a key.
        """
        self._write_connection()
        self._needed["superlink"] = self._forks.start(
            "flower-superlink",
            *self._server_options(),
            *("--isolation", "process", "--host", LOOPBACK, "--port", str(self._port)),
            "--disable-runtime-dependency-installation",
            log="superlink",
        )
        self._needed["server"] = self._superexec(self._port, self._trusting, log="server")
        deadline = time.monotonic() + START_SECONDS
        while not answers(self._port):
            self.check()
            if time.monotonic() > deadline:
                raise FedparaError(f"{self._log('superlink')}: expected a SuperLink that answers, found none")
            time.sleep(POLL_SECONDS)
        for number, path in enumerate(data):
            self._start_node(number, path)

    def run(self, app: Path, settings: Mapping[str, Any]) -> int:
        """Start the rounds of a Flower app; the process that ends when they do."""
        pairs = _pairs(settings)
        return self._forks.start("flwr", "run", str(app), CONNECTION, "--run-config", pairs, "--stream", log="run")

    def check(self) -> list[str]:
        """Names of the nodes that ended since the last time.

        Raises:
            FedparaError: A program ended that is needed to go on.
        """
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

    def _start_node(self, number: int, data: Path) -> None:
        name, port = f"node-{number}", self._node_ports[number]
        key: Sequence[str] = ()
        if self._secure:
            public = make_node_key(self._keys / name)
            self._flwr("supernode", "register", str(public), CONNECTION, log=f"{name}-register")
            key = ("--auth-supernode-private-key", str(self._keys / name))
        config = {"data": data, "state": self._local / "nodes" / name, "threads": 1}
        self._nodes[name] = self._forks.start(
            "flower-supernode",
            *self._trusting,
            *key,
            *("--superlink", f"{LOOPBACK}:{self._port}"),
            *("--isolation", "process", "--host", LOOPBACK, "--port", str(port)),
            *("--node-config", _pairs(config)),
            log=name,
        )
        self._superexec(port, ("--insecure",), log=name)

    def _superexec(self, port: int, trusting: Sequence[str], *, log: str) -> int:
        return self._forks.start(
            "flower-superexec",
            *trusting,
            *("--runtime-api-address", f"{LOOPBACK}:{port}"),
            log=log,
            wait_for=lambda: answers(port, seconds=START_SECONDS),
        )

    def _server_options(self) -> Sequence[str]:
        if not self._secure:
            return ("--insecure",)
        make_certificates(self._keys, ("localhost", LOOPBACK), authority="fedpara-edge fleet")
        files = {"ca-certfile": AUTHORITY, "certfile": CERTIFICATE, "keyfile": KEY}
        options = [(f"--ssl-{name}", str(self._keys / file)) for name, file in files.items()]
        return [part for pair in options for part in pair] + ["--enable-supernode-auth"]

    def _flwr(self, *arguments: str, log: str) -> str:
        """Run a command of `flwr` to its end; what it printed."""
        pid = self._forks.start("flwr", *arguments, log=log)
        while self._forks.ended(pid) is None:
            time.sleep(POLL_SECONDS)
        return self._log(log).read_text(encoding="utf-8", errors="replace")

    def _log(self, name: str) -> Path:
        return self._local / "logs" / f"{name}.log"

    def _write_connection(self) -> None:
        trust = f"root-certificates = {_quoted(self._keys / AUTHORITY)}" if self._secure else "insecure = true"
        address = _quoted(f"{LOOPBACK}:{self._port}")
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = {address}\n{trust}\n'
        (self._local / "flower" / "config.toml").write_text(text, encoding="utf-8")


def _pairs(settings: Mapping[str, Any]) -> str:
    """Settings as `--run-config` and `--node-config` take them."""
    return " ".join(f"{key}={value if isinstance(value, int) else _quoted(value)}" for key, value in settings.items())


def _quoted(value: Any) -> str:
    return json.dumps(str(value), ensure_ascii=False)
