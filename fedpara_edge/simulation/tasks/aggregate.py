"""The server's part in a round: updates to the next weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.formats.serverstate import write_server_state
from fedpara_edge.simulation.folder import JobFolder
from fedpara_edge.simulation.tasks.rehearsal import Rehearsal

CONTROL = "control"
"""Group of a server state that scaffold's devices need."""


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """What a round came to, but for the tensors.

    Args:
        gap: Aggregation gap of the factors that the server's step starts from, relative; None if no factors travel.
        mean_gap: Aggregation gap of the mean of the factors, which is the same unless they were refitted.
        weights_bytes: Size of the next weights.
        change_bytes: Size of the change that leads to them; None if whole weights are sent.
    """

    gap: float | None = None
    mean_gap: float | None = None
    weights_bytes: int = 0
    change_bytes: int | None = None


def aggregate_round(
    folder: JobFolder, *, round: int, clients: Iterable[str], weights: Path, config: AggregateConfig
) -> tuple[Aggregated, tuple[str, ...]]:
    """Aggregate updates, and write the next weights and what belongs with them.

    Args:
        folder: Folder of the federation.
        round: Round whose updates these are, from 0 on.
        clients: Clients that sent one.
        weights: Weights file that they were trained from.
        config: Algorithm, weighting and the like.

    Returns:
        What the round came to, and the codes of the updates that were refused (`fedpara_edge.errors`).

    Raises:
        TooFewUpdatesError: No update could be used.
        DivergedError: The updates lead beyond what can be sent.
        FedparaError: A file is damaged or can't be written.
    """
    number, sends_changes = round + 1, config.downlink_codec is not None
    done = run_round(
        map(folder.update, clients),
        weights,
        folder.weights(number),
        config,
        state=folder.server if config.server_algorithm.groups or sends_changes else None,
        change=folder.change(number) if sends_changes else None,
        budget=None if config.privacy is None else Rehearsal(),
        overwrite=True,
    )
    result = done.aggregation
    if result.state is not None and CONTROL in result.state.groups:
        # The server's own file may have more in it than devices need.
        control = folder.control(number)
        write_server_state(control, replace(result.state, groups={CONTROL: result.state.groups[CONTROL]}))
    of_mean = None if result.gap is None else result.gap.relative
    aggregated = Aggregated(
        gap=result.refit.after if result.refit else of_mean,
        mean_gap=result.refit.before if result.refit else of_mean,
        weights_bytes=done.weights_bytes,
        change_bytes=done.change_bytes,
    )
    return aggregated, tuple(update.code for update in result.rejected)
