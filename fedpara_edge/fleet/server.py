"""The ServerApp: `app` runs the rounds that are left (`rounds`)."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpara_edge.errors import FedparaError
from fedpara_edge.fleet.rounds import run_fleet
from fedpara_edge.fleet.settings import FleetConfig, from_flower

SAID = "fedpara-edge: "
"""Beginning of the lines in the log that tell what went wrong with a device."""

app = ServerApp()


class RunFailedError(Exception):
    """The end of a run that failed, as Flower's record has it: `[code] sentence`."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the fleet.

    Raises:
        RunFailedError: They failed; Flower's record has the code and the sentence.
    """
    try:
        run_fleet(grid, from_flower(FleetConfig, context.run_config), lambda line: print(f"{SAID}{line}", flush=True))
    except FedparaError as error:
        raise RunFailedError(f"[{error.code}] {error}") from error
