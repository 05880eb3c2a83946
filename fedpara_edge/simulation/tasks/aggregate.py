"""The server's part in a round: updates to the next weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.aggregation.gate import Gate
from fedpara_edge.formats.serverstate import write_control
from fedpara_edge.privacy.budget import Budget
from fedpara_edge.simulation.folder import JobFolder
from fedpara_edge.simulation.tasks.rehearsal import Rehearsal


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
    budget = None if config.privacy is None else Rehearsal()
    done = write_round(folder, map(folder.update, clients), round=round, weights=weights, config=config, budget=budget)
    return aggregated(done), tuple(update.code for update in done.aggregation.rejected)


def write_round(
    folder: JobFolder,
    updates: Iterable[Path],
    *,
    round: int,
    weights: Path,
    config: AggregateConfig,
    gate: Gate | None = None,
    budget: Budget | None = None,
) -> Round:
    """Do a round of the server on the files of a federation.

    Args:
        folder: Folder of the federation.
        updates: Update files.
        round: Round whose updates these are, from 0 on.
        weights: Weights file that they were trained from.
        config: Algorithm, weighting and the like.
        gate: Judge of whose each update is; None to believe the names in the files.
        budget: Budget that pays for the noise of `config.privacy`.

    Raises:
        FedparaError: As `run_round` does.
    """
    number, sends_changes = round + 1, config.downlink_codec is not None
    keeps = config.server_algorithm.groups or sends_changes or config.max_staleness
    done = run_round(
        updates,
        weights,
        folder.weights(number),
        config,
        state=folder.server if keeps else None,
        change=folder.change(number) if sends_changes else None,
        gate=gate,
        budget=budget,
        overwrite=True,
    )
    write_control(folder.control(number), done.aggregation.state)
    return done


def aggregated(done: Round) -> Aggregated:
    """What a round came to."""
    result = done.aggregation
    of_mean = None if result.gap is None else result.gap.relative
    return Aggregated(
        gap=result.refit.after if result.refit else of_mean,
        mean_gap=result.refit.before if result.refit else of_mean,
        weights_bytes=done.weights_bytes,
        change_bytes=done.change_bytes,
    )
