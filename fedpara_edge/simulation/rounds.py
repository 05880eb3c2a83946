"""The rounds of one federation, one after the other until it is done.

The work of a round is done by the worker processes; the thread that drives a federation only waits for them. What a
round writes before it is committed to the metrics is written again, with the same bytes, when a killed run goes on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from fedpara_edge.errors import DivergedError
from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.simulation.evaluating import evaluate_round
from fedpara_edge.simulation.job import Job
from fedpara_edge.simulation.metrics import Event
from fedpara_edge.simulation.sampling import client_seed
from fedpara_edge.simulation.tasks.measures import Measured, Measuring, measure
from fedpara_edge.simulation.tasks.merging import Merged, Merging, merge_round
from fedpara_edge.simulation.tasks.training import Trained, Training, train_client
from fedpara_edge.simulation.traffic import download_bytes


def run_job(job: Job, pool: Executor, *, on_trained: Callable[[str], None]) -> None:
    """Run the rounds that are left.

    Args:
        job: the federation.
        pool: worker processes.
        on_trained: called with the job's name whenever a client was trained.

    Raises:
        FedparaError: a file can't be written, or was changed by somebody else.
    """
    journal = job.journal
    if job.is_done:
        return
    if not journal.of(job.arm.name, job.seed, "arm"):
        journal.append(_arm_event(job))
    job.folder.make(job.clients.names)
    diverged = None
    for round in range(job.rounds_done, job.arm.rounds):
        started = time.monotonic()
        job.folder.clear(round)
        events, diverged = _run_round(job, pool, round, on_trained)
        if diverged is not None:
            break
        *before, last = events
        journal.append(*before, {**last, "seconds": time.monotonic() - started})
    rounds = journal.of(job.arm.name, job.seed, "round")
    seconds = sum(event["seconds"] for event in rounds)
    job.folder.clear(len(rounds))
    journal.append(job.event("done", rounds=len(rounds), seconds=seconds, diverged=diverged))


def _run_round(
    job: Job, pool: Executor, round: int, on_trained: Callable[[str], None]
) -> tuple[Sequence[Event], str | None]:
    """The events of a round, or why there is none."""
    plan, number = job.plan, round + 1
    trained = _train(job, pool, round, on_trained)
    good = {client: result for client, result in trained.items() if result.diverged is None}
    merged = Merged() if job.arm.local_only else pool.submit(merge_round, _merging(job, round, tuple(good))).result()
    if not good or merged.diverged is not None:
        reasons = [result.diverged for result in trained.values() if result.diverged is not None]
        return (), merged.diverged if good else reasons[0]
    rejected = Counter([DivergedError.code] * (len(trained) - len(good)) + list(merged.rejected))
    is_evaluated, is_last = plan.is_evaluated(number, last=job.arm.rounds), number == job.arm.rounds
    measuring = _measuring(job, number, ranks=is_evaluated, at_any_cost=is_last)
    measured = pool.submit(measure, measuring)
    accuracy = loss = None
    events = []
    if is_evaluated:
        total, each = evaluate_round(job, pool, number)
        accuracy, loss = (total.to_json()[key] for key in ("accuracy", "loss"))
        if each:
            events.append(job.event("clients", round=number, clients={name: s.to_json() for name, s in each.items()}))
    events.append(
        job.event(
            "round",
            round=number,
            accuracy=accuracy,
            loss=loss,
            **_sums(good),
            **_traffic(job, round, good),
            participants=len(trained),
            rejected=rejected.total(),
            rejections=dict(sorted(rejected.items())),
            **_of_weights(measured.result(), merged),
        )
    )
    return events, None


def _train(job: Job, pool: Executor, round: int, on_trained: Callable[[str], None]) -> dict[str, Trained]:
    participants = job.participants(round)
    numbers = {client: number for number, client in enumerate(job.clients.names)}
    examples = {client.name: client.examples for client in job.clients.clients}
    futures = {}
    # The longest first, so that no worker is left with a long one at the end.
    for client in sorted(participants, key=lambda client: -examples[client]):
        training = _training(job, round, client, seed=client_seed(job.seed, numbers[client]))
        futures[client] = pool.submit(train_client, training)
        futures[client].add_done_callback(lambda _: on_trained(job.name))
    return {client: futures[client].result() for client in participants}


def _training(job: Job, round: int, client: str, *, seed: int) -> Training:
    arm, folder = job.arm, job.folder
    weights = job.weights_of(client, round)
    control = folder.control(round)
    return Training(
        model=job.model,
        data=job.clients.train(client),
        weights=weights,
        config=arm.train.config(seed=seed),
        output=folder.update(client),
        state=folder.state(client),
        client=client,
        codec="float32" if arm.local_only else arm.train.codec,
        control=control if control.exists() else None,
        own=folder.own_weights(client, round + 1) if arm.local_only else None,
        round=round,
    )


def _merging(job: Job, round: int, clients: Sequence[str]) -> Merging:
    folder = job.folder
    return Merging(
        updates=tuple(folder.update(client) for client in clients),
        weights=job.weights_of("", round),
        plan=job.arm.aggregate,
        clients=len(job.clients.clients),
        server=folder.server,
        output=folder.weights(round + 1),
        change=folder.change(round + 1),
        control=folder.control(round + 1),
    )


def _measuring(job: Job, number: int, *, ranks: bool, at_any_cost: bool) -> Measuring:
    """Of the common weights; of the first client's, whoever takes part, where clients have models of their own."""
    client = job.clients.names[0]
    return Measuring(
        bundle=job.bundle.path,
        weights=job.weights_of(client, number),
        state=job.state_of(client),
        ranks=ranks,
        at_any_cost=at_any_cost,
    )


def _sums(good: Mapping[str, Trained]) -> dict[str, float]:
    examples = sum(result.examples for result in good.values())
    return {
        "train_loss": sum(result.loss * result.examples for result in good.values()) / examples,
        "train_seconds": sum(result.seconds for result in good.values()) / len(good),
    }


def _traffic(job: Job, round: int, good: Mapping[str, Trained]) -> dict[str, int]:
    if job.arm.local_only:
        return {"up_bytes": 0, "down_bytes": 0}
    participants = job.participants(round)
    control = job.folder.control(round)
    control_bytes = control.stat().st_size if control.exists() else 0
    done = job.journal.of(job.arm.name, job.seed, "round")
    weights_bytes = [job.bundle.file(WEIGHTS).stat().st_size, *(event["weights_bytes"] for event in done)]
    if job.arm.aggregate.sends_changes:
        change_bytes = [0, *(event["change_bytes"] for event in done)]
        held = {client: before for before in range(round) for client in job.participants(before)}
        downloads = [
            download_bytes(
                round,
                held.get(client),
                weights_bytes=weights_bytes,
                change_bytes=change_bytes,
                snapshot_every=job.arm.aggregate.snapshot_every,
            )
            for client in participants
        ]
    else:
        downloads = [weights_bytes[round]] * len(participants)
    return {
        "up_bytes": sum(result.update_bytes for result in good.values()),
        "down_bytes": sum(downloads) + control_bytes * len(participants),
    }


def _of_weights(measured: Measured, merged: Merged) -> dict[str, Any]:
    return {
        "gap": merged.gap,
        "mean_gap": merged.mean_gap,
        "factor_norm": measured.factor_norm,
        "weight_norm": measured.weight_norm,
        "ranks": measured.ranks,
        "weights_bytes": merged.weights_bytes,
        "change_bytes": merged.change_bytes,
    }


def _arm_event(job: Job) -> Event:
    arm, layout = job.arm, job.bundle.manifest.layout
    shared = 0 if arm.local_only else layout.shared_parameters
    trained = sum(tensor.size for tensor in layout.with_role("shared", "personal"))
    return job.event(
        "arm",
        model=arm.model.name,
        kind=arm.model.kind,
        gamma=None if arm.model.kind == "dense" else arm.model.gamma,
        algorithm=arm.algorithm,
        weighting=None if arm.local_only else arm.aggregate.effective_weighting,
        codec=arm.train.codec,
        downlink_codec=arm.aggregate.downlink_codec,
        shared_parameters=shared,
        personal_parameters=trained - shared,
        dense_parameters=layout.dense_parameters,
        full_ranks={layer.name: min(layer.matrix_shape) for layer in layout.layers if layer.kind != "dense"},
        clients=len(job.clients.clients),
        left_out=job.clients.left_out,
        participants=len(job.participants(0)),
        local_only=arm.local_only,
    )
