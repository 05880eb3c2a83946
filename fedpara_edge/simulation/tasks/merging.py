"""The server's side of a round, in a worker process: updates to the next weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedpara_edge.aggregation import run_round
from fedpara_edge.errors import DivergedError, TooFewUpdatesError
from fedpara_edge.formats.serverstate import write_server_state
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.simulation.plan.plan import AggregatePlan

CONTROL = "control"
"""The group of a server state that scaffold's devices need."""


@dataclass(frozen=True, kw_only=True)
class Merging:
    """The updates of a round.

    Args:
        updates: the files.
        weights: file that they were trained from.
        plan: how they are aggregated.
        clients: number of all clients.
        server: the server's state folder.
        output: next weights to write.
        change: file to write with what leads to them, if changes are sent.
        control: file to write with what devices need for scaffold.
    """

    updates: tuple[Path, ...]
    weights: Path
    plan: AggregatePlan
    clients: int
    server: Path
    output: Path
    change: Path
    control: Path


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What came of the updates.

    Args:
        rejected: the codes of those that were refused (`fedpara_edge.errors`).
        gap: the aggregation gap of the factors that the server's step starts from, relative; None if no factors travel.
        mean_gap: that of the mean of the factors, which is the same unless they were refitted.
        weights_bytes: size of the next weights.
        change_bytes: size of the change that leads to them; None if whole weights are sent.
        diverged: why there are no next weights, if so.
    """

    rejected: tuple[str, ...] = ()
    gap: float | None = None
    mean_gap: float | None = None
    weights_bytes: int = 0
    change_bytes: int | None = None
    diverged: str | None = None


def merge_round(merging: Merging) -> Merged:
    """Aggregate updates and write the next weights and the server's state.

    Raises:
        FedparaError: anything but that no update was good, or that they lead beyond what can be sent.
    """
    plan, number = merging.plan, read_weights(merging.weights).round + 1
    config = plan.config(clients=merging.clients)
    keeps = bool(config.server_algorithm.groups) or plan.sends_changes
    try:
        done = run_round(
            merging.updates,
            merging.weights,
            merging.output,
            config,
            state=merging.server if keeps else None,
            change=merging.change if plan.sends_changes else None,
            overwrite=True,
        )
    except DivergedError as error:
        return Merged(diverged=f"round {number}: {error}")
    except TooFewUpdatesError as error:
        codes = tuple(refused.code for refused in error.rejected)
        return Merged(rejected=codes, diverged=f"round {number}: no update could be used ({', '.join(codes)})")
    result = done.aggregation
    if result.state is not None and CONTROL in result.state.groups:
        # The server's own file may have more in it than devices need.
        control = {CONTROL: result.state.groups[CONTROL]}
        write_server_state(merging.control, replace(result.state, groups=control))
    of_mean = None if result.gap is None else result.gap.relative
    return Merged(
        rejected=tuple(update.code for update in result.rejected),
        gap=result.refit.after if result.refit else of_mean,
        mean_gap=result.refit.before if result.refit else of_mean,
        weights_bytes=done.weights_bytes,
        change_bytes=done.change_bytes,
    )
