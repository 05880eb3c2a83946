"""A Flower app as Flower's own tutorials write it: FedAvg of the dense model's arrays, trained by torch.

It runs on SuperNodes and in Flower's simulation. Its settings are a JSON file that the environment variable
`STOCK_FLOWER` names: `clients` (folders with x.npy and y.npy), `fraction` of them in a round, `rounds`, `times` (a file
for the time after each round), and the options of `plain.train_epoch` in `train`.

    python benchmarks/stock_flower.py      # in Flower's simulation
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from plain import train_epoch

from fedpara_edge.nn import ZOO

SETTINGS = "STOCK_FLOWER"

client = ClientApp()
server = ServerApp()


def settings() -> dict[str, Any]:
    """The settings of this run."""
    return json.loads(Path(os.environ[SETTINGS]).read_text(encoding="utf-8"))


def make_model() -> torch.nn.Module:
    """The dense cnn of the zoo."""
    return ZOO["cnn"].factory(kind="dense")


class Timed(FedAvg):
    """FedAvg that notes when each round began and ended.

    Args:
        times: File with a line for each time.
        options: Options of FedAvg.
    """

    def __init__(self, times: Path, **options: Any) -> None:
        super().__init__(**options)
        self._times = times

    def _note(self) -> None:
        with self._times.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of a round."""
        if server_round == 1:
            self._note()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the replies."""
        found = super().aggregate_train(server_round, replies)
        self._note()
        return found


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train a round on the data of this node."""
    options = settings()
    torch.set_num_threads(1)
    model = make_model()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    folder = Path(options["clients"][int(context.node_config["partition-id"])])
    x, y = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in "xy")
    loss = train_epoch(model, x, y.long(), **options["train"])
    metrics = MetricRecord({"loss": loss, "num-examples": len(y)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server.main()
def run(grid: Grid, _: Context) -> None:
    """Run the rounds."""
    options = settings()
    count = len(options["clients"])
    strategy = Timed(
        Path(options["times"]),
        fraction_train=options["fraction"],
        fraction_evaluate=0.0,
        min_train_nodes=2,
        min_available_nodes=count,
    )
    strategy.start(grid=grid, initial_arrays=ArrayRecord(make_model().state_dict()), num_rounds=options["rounds"])


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    run_simulation(server, client, len(settings()["clients"]), backend_config={"client_resources": {"num_cpus": 1}})
