"""The rounds of one federation, one after the other until it is done.

The work of a round is done by the workers; the thread that drives a federation only waits for them. What a
round writes before it is committed to the metrics is written again, with the same bytes, when a killed run goes on.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from device_runtime.result import TrainResult
from fedpara_edge.errors import DivergedError, TooFewUpdatesError
from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.simulation.about import about
from fedpara_edge.simulation.evaluating import evaluate_round
from fedpara_edge.simulation.job import Job
from fedpara_edge.simulation.metrics import Event
from fedpara_edge.simulation.processes import Workers
from fedpara_edge.simulation.sampling import client_seed
from fedpara_edge.simulation.tasks.aggregate import Aggregated, aggregate_round
from fedpara_edge.simulation.tasks.measure import Measures, measure_weights, rank_operations
from fedpara_edge.simulation.tasks.train import train_alone, train_client
from fedpara_edge.simulation.traffic import download_bytes


def run_job(job: Job, workers: Workers, *, on_trained: Callable[[str], None]) -> None:
    """Run the rounds that are left, of a federation that has some or has not come to its end.

    Args:
        job: The federation.
        workers: Workers.
        on_trained: Function that is called with the job's name whenever a client was trained.

    Raises:
        FedparaError: A file can't be written, or was changed by somebody else.
    """
    journal = job.journal
    if not journal.of(job.arm.name, job.seed, "arm"):
        journal.append(_arm_event(job))
    journal.revise(partial(_without_ending, job))
    job.folder.make(job.clients.names)
    diverged = None
    for round in range(job.rounds_done, job.arm.rounds):
        started = time.monotonic()
        job.folder.clear(round)
        try:
            *before, last = _run_round(job, workers, round, on_trained)
        except DivergedError as error:
            diverged = str(error)
            break
        journal.append(*before, {**last, "seconds": time.monotonic() - started})
    rounds = journal.of(job.arm.name, job.seed, "round")
    seconds = sum(event.get("seconds") or 0 for event in rounds)
    job.folder.clear(len(rounds))
    journal.append(job.event("done", rounds=len(rounds), seconds=seconds, diverged=diverged))


def _without_ending(job: Job, event: Event) -> Event | None:
    """An event of a run that goes on, without what was measured because the run was to end there."""
    if (event["arm"], event["seed"]) != (job.arm.name, job.seed):
        return event
    if event["event"] in ("clients", "round") and (number := event["round"]) < job.arm.rounds:
        if not job.plan.is_evaluated(number, last=job.arm.rounds):
            nothing = dict.fromkeys(("accuracy", "loss", "ranks"))
            return {**event, **nothing} if event["event"] == "round" else None
        if event["event"] == "round" and rank_operations(job.bundle.manifest.layout) > job.most_rank_operations:
            return {**event, "ranks": None}
    return event


def _run_round(job: Job, workers: Workers, round: int, on_trained: Callable[[str], None]) -> list[Event]:
    """The events of a round.

    Raises:
        DivergedError: There are no next weights.
    """
    number = round + 1
    trained = _train(job, workers, round, on_trained)
    good = {client: result for client, result in trained.items() if isinstance(result, TrainResult)}
    if not good:
        raise next(result for result in trained.values() if isinstance(result, DivergedError))
    aggregated, refused = (Aggregated(), ()) if job.arm.local_only else _aggregate(job, workers, round, good)
    missing = job.missing(round)
    rejected = Counter([*refused, *missing.values(), *[DivergedError.code] * (len(trained) - len(good))])
    is_evaluated = job.plan.is_evaluated(number, last=job.arm.rounds)
    measures = _measure(job, workers, number, ranks=is_evaluated)
    accuracy = loss = None
    events = []
    if is_evaluated:
        total, each = evaluate_round(job, workers, number)
        accuracy, loss = (total.to_json()[key] for key in ("accuracy", "loss"))
        if each:
            events.append(job.event("clients", round=number, clients={name: t.to_json() for name, t in each.items()}))
    events.append(
        job.event(
            "round",
            round=number,
            accuracy=accuracy,
            loss=loss,
            **_sums(good),
            **_traffic(job, round, good),
            participants=len(trained) + len(missing),
            rejected=rejected.total(),
            rejections=dict(sorted(rejected.items())),
            **vars(aggregated),
            **vars(measures.result()),
        )
    )
    return events


def _train(
    job: Job, workers: Workers, round: int, on_trained: Callable[[str], None]
) -> dict[str, TrainResult | DivergedError]:
    numbers = {client: number for number, client in enumerate(job.clients.names)}
    examples = {client.name: client.examples for client in job.clients.clients}
    futures = {}
    # The longest first, so that no worker is left with a long one at the end.
    for client in sorted(job.trained(round), key=lambda client: -examples[client]):
        futures[client] = workers.engines.submit(
            train_alone if job.arm.local_only else train_client,
            job.model,
            job.folder,
            client=client,
            round=round,
            data=job.clients.train(client),
            weights=job.weights_of(client, round),
            options=replace(job.arm.train, seed=client_seed(job.seed, numbers[client])),
        )
        futures[client].add_done_callback(lambda _: on_trained(job.name))
    return {client: _result_or_divergence(futures[client]) for client in job.trained(round)}


def _result_or_divergence(future: Future[TrainResult]) -> TrainResult | DivergedError:
    try:
        return future.result()
    except DivergedError as error:
        return error


def _aggregate(
    job: Job, workers: Workers, round: int, good: Mapping[str, TrainResult]
) -> tuple[Aggregated, tuple[str, ...]]:
    task = workers.files.submit(
        aggregate_round,
        job.folder,
        round=round,
        clients=tuple(good),
        weights=job.weights_of("", round),
        config=job.arm.server(clients=len(job.clients.clients)),
    )
    try:
        return task.result()
    except DivergedError as error:
        raise DivergedError(f"round {round + 1}: {error}") from error
    except TooFewUpdatesError as error:
        codes = ", ".join(refused.code for refused in error.rejected)
        raise DivergedError(f"round {round + 1}: no update could be used ({codes})") from error


def _measure(job: Job, workers: Workers, number: int, *, ranks: bool) -> Future[Measures]:
    """Of the common weights; of the first client's, whoever takes part, where clients have models of their own."""
    client = job.clients.names[0]
    most_operations = math.inf if number == job.arm.rounds else job.most_rank_operations
    return workers.files.submit(
        measure_weights,
        bundle=job.bundle.path,
        weights=job.weights_of(client, number),
        state=job.state_of(client),
        most_operations=most_operations if ranks else 0,
    )


def _sums(good: Mapping[str, TrainResult]) -> dict[str, float]:
    examples = sum(result.examples for result in good.values())
    return {
        "train_loss": sum(result.losses[-1] * result.examples for result in good.values()) / examples,
        "train_seconds": sum(result.seconds for result in good.values()) / len(good),
    }


def _traffic(job: Job, round: int, good: Mapping[str, TrainResult]) -> dict[str, int]:
    if job.arm.local_only:
        return {"up_bytes": 0, "down_bytes": 0}
    participants = job.participants(round)
    control = job.folder.control(round)
    control_bytes = control.stat().st_size if control.exists() else 0
    done = job.journal.of(job.arm.name, job.seed, "round")
    weights_bytes = [job.bundle.file(WEIGHTS).stat().st_size, *(event.get("weights_bytes") or 0 for event in done)]
    held = {client: before for before in range(round) for client in job.participants(before)}
    downloads = [
        download_bytes(
            round,
            held.get(client) if job.arm.sends_changes else None,
            weights_bytes=weights_bytes,
            change_bytes=[0, *(event.get("change_bytes") or 0 for event in done)] if job.arm.sends_changes else [],
            snapshot_every=job.arm.aggregate.snapshot_every,
        )
        for client in participants
    ]
    return {
        "up_bytes": sum(result.update_bytes for result in good.values()),
        "down_bytes": sum(downloads) + control_bytes * len(participants),
    }


def _arm_event(job: Job) -> Event:
    return job.event(
        "arm",
        **about(job.arm, job.bundle.manifest.layout),
        **({} if job.torch is None else {"engine": job.torch.choice.name}),
        clients=len(job.clients.clients),
        left_out=job.clients.left_out,
        participants=len(job.participants(0)),
    )
