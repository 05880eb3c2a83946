"""Rounds of a few clients of the small network, who share nothing but files with their server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_net import CLASSES, SHAPE

from device_runtime import TrainConfig, open_data, open_engine, train
from device_runtime.engines.protocol import Engine
from device_runtime.engines.registry import ENGINES
from device_runtime.state import DeviceState
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.algorithms import ClientAlgorithm, ServerAlgorithm
from fedpara_edge.algorithms.adaptive import FedAdam
from fedpara_edge.algorithms.fedavg import FedAvgClient, FedAvgServer
from fedpara_edge.algorithms.feddyn import FedDynClient, FedDynServer
from fedpara_edge.algorithms.fedprox import FedProx
from fedpara_edge.algorithms.scaffold import ScaffoldClient, ScaffoldServer
from fedpara_edge.codecs import find_encoder
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.serverstate import ServerState, read_server_state
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.options import typed
from fedpara_edge.storage.rounds import round_path

EXAMPLES = (8, 20, 13)  # of the clients: 1, 3 and 2 batches an epoch
ROUNDS = ((0, 1, 2), (0, 2), (1, 2), (0, 1))  # who takes part
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.5, seed=3, schedule="linear", lr_decay=0.9)
every_engine = pytest.mark.parametrize("engine", ENGINES)


def write_data(path: Path, client: int) -> Path:
    """Data that lean to other classes on each client."""
    generator = np.random.default_rng(client)
    x = generator.standard_normal((EXAMPLES[client], *SHAPE), np.float32)
    np.savez(path, x=x, y=(generator.integers(0, 3, EXAMPLES[client]) + client) % CLASSES)
    return path


@dataclass
class Federation:
    """A folder with a server and its clients, who share nothing but files."""

    folder: Path
    bundle: Bundle
    engine: str
    local: ClientAlgorithm
    server: ServerAlgorithm
    weights: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "server").mkdir()
        self.weights = self.bundle.file(WEIGHTS)

    def open_engine(self) -> Engine:
        return open_engine(self.bundle, self.engine, threads=1)

    def state(self, client: int) -> DeviceState:
        return DeviceState(self.folder / f"state-{client}", self.bundle.manifest.fingerprint)

    def train(
        self,
        client: int,
        config: TrainConfig = CONFIG,
        *,
        engine: Engine | None = None,
        codec: str = "float32",
        **options: Any,
    ) -> Path:
        """One client's call; its update."""
        base = read_weights(self.weights)
        control = round_path(self.folder / "server", base.round)
        data = write_data(self.folder / f"{client}.npz", client)
        output = self.folder / f"{client}-{base.round}.safetensors"
        train(
            engine or self.open_engine(),
            open_data(data, self.bundle.manifest),
            self.weights,
            replace(config, algorithm=typed(self.local.name, self.local)),
            output=output,
            state=self.folder / f"state-{client}",
            client=f"client-{client}",
            server_state=control if self.local.controlled and control.exists() else None,
            encoder=find_encoder(codec),
            **options,
        )
        return output

    def round(self, clients: Sequence[int], config: TrainConfig = CONFIG, **options: Any) -> Weights:
        """A whole round; the next weights."""
        updates = [self.train(client, config, **options) for client in clients]
        output = self.folder / f"round-{read_weights(self.weights).round + 1}.safetensors"
        server = AggregateConfig(algorithm=typed(self.server.name, self.server), strict=True)
        done = run_round(updates, self.weights, output, server, state=self.folder / "server")
        self.weights = output
        return done.aggregation.weights

    def server_state(self) -> ServerState:
        return read_server_state(round_path(self.folder / "server", read_weights(self.weights).round))


PAIRS: dict[str, tuple[ClientAlgorithm, ServerAlgorithm]] = {
    "fedavg": (FedAvgClient(), FedAvgServer()),
    "fedprox": (FedProx(mu=0.7), FedAvgServer()),
    "fedprox and fedadam": (FedProx(mu=0.2), FedAdam(lr=0.05)),
    "scaffold": (ScaffoldClient(), ScaffoldServer(clients=3, lr=0.8)),
    "feddyn": (FedDynClient(alpha=0.3), FedDynServer(clients=3, alpha=0.3)),
}
