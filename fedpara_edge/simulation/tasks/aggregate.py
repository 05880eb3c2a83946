"""The server's part in a round: updates to the next weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.formats.serverstate import write_server_state

CONTROL = "control"
"""Group of a server state that scaffold's devices need."""


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """What a round came to, but for the tensors.

    Args:
        rejected: Codes of the updates that were refused (`fedpara_edge.errors`).
        gap: Aggregation gap of the factors that the server's step starts from, relative; None if no factors travel.
        mean_gap: Aggregation gap of the mean of the factors, which is the same unless they were refitted.
        weights_bytes: Size of the next weights.
        change_bytes: Size of the change that leads to them; None if whole weights are sent.
    """

    rejected: tuple[str, ...] = ()
    gap: float | None = None
    mean_gap: float | None = None
    weights_bytes: int = 0
    change_bytes: int | None = None


def aggregate_round(
    *,
    updates: Sequence[Path],
    weights: Path,
    config: AggregateConfig,
    output: Path,
    state: Path,
    change: Path,
    control: Path,
) -> Aggregated:
    """Aggregate updates, and write the next weights and what belongs with them.

    Args:
        updates: Update files.
        weights: Weights file that they were trained from.
        config: Algorithm, weighting and the like.
        output: Weights file to write.
        state: Server's state folder, used if anything is kept.
        change: Change file to write, if changes are sent.
        control: File to write with what devices need for scaffold.

    Raises:
        TooFewUpdatesError: No update could be used.
        DivergedError: The updates lead beyond what can be sent.
        FedparaError: A file is damaged or can't be written.
    """
    sends_changes = config.downlink_codec is not None
    keeps = bool(config.server_algorithm.groups) or sends_changes
    done = run_round(
        updates,
        weights,
        output,
        config,
        state=state if keeps else None,
        change=change if sends_changes else None,
        overwrite=True,
    )
    result = done.aggregation
    if result.state is not None and CONTROL in result.state.groups:
        # The server's own file may have more in it than devices need.
        write_server_state(control, replace(result.state, groups={CONTROL: result.state.groups[CONTROL]}))
    of_mean = None if result.gap is None else result.gap.relative
    return Aggregated(
        rejected=tuple(update.code for update in result.rejected),
        gap=result.refit.after if result.refit else of_mean,
        mean_gap=result.refit.before if result.refit else of_mean,
        weights_bytes=done.weights_bytes,
        change_bytes=done.change_bytes,
    )
