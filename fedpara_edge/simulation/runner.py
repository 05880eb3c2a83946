"""A whole simulation: everything is made and checked, then the federations run side by side until they are done.

Their rounds are cut into tasks that the worker processes share. As many federations are under way at once as the
workers need to find something to do while one of them waits for its slowest client or is being evaluated, and no more,
as each costs every worker an open engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedpara_edge.errors import FedparaError, InputError, counted
from fedpara_edge.simulation.bundles import check_bundle, make_model, with_example_as_arrays
from fedpara_edge.simulation.data.clients import Clients, read_clients, write_clients
from fedpara_edge.simulation.folder import RunFolder, open_run
from fedpara_edge.simulation.growth import is_finished
from fedpara_edge.simulation.job import MOST_RANK_OPERATIONS, Job
from fedpara_edge.simulation.metrics import Event, Journal
from fedpara_edge.simulation.plan.plan import Arm, Plan, read_plan
from fedpara_edge.simulation.processes import Workers, open_pool, open_threads
from fedpara_edge.simulation.rounds import run_job
from fedpara_edge.simulation.tasks.engines import Model
from fedpara_edge.simulation.torchengine.choice import EngineChoice, TorchSource

TASKS_PER_WORKER = 3
OF_PLAN = EngineChoice()
OnStart = Callable[[int], None]
OnTrained = Callable[[str], None]
OpenNodes = Callable[..., AbstractContextManager[Executor]]
"""Function as `fedpara_edge.fleet.simulated.open_nodes`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one arm with one seed has come to.

    Args:
        arm: Name of the arm.
        seed: Seed of the plan.
        parameters: Number of parameters that travel.
        rounds: Number of rounds done.
        accuracy: Accuracy after the last round of the plan; None if the run ended before, or if the loss has no
            accuracy or is not finite.
        loss: Loss after the last round of the plan; None if the run ended before, or if it is not finite.
        up_bytes: Bytes sent by all clients in all rounds.
        down_bytes: Bytes sent to all clients in all rounds.
        diverged: Reason of an early end; None if there was none.
    """

    arm: str
    seed: int
    parameters: int
    rounds: int
    accuracy: float | None
    loss: float | None
    up_bytes: int
    down_bytes: int
    diverged: str | None


def simulate(
    plan: Path | str,
    run: Path | str,
    *,
    workers: int | None = None,
    arms: Sequence[str] = (),
    engine: EngineChoice = OF_PLAN,
    nodes: OpenNodes | None = None,
    most_rank_operations: int = MOST_RANK_OPERATIONS,
    on_start: OnStart = lambda _: None,
    on_trained: OnTrained = lambda _: None,
) -> list[Outcome]:
    """Run a plan, or go on with a run that was interrupted, or whose plan has more rounds, arms or seeds by now.

    The metrics are the same but for seconds, however often it was interrupted and in whatever steps it grew.

    Args:
        plan: Plan file.
        run: Run folder.
        workers: Number of worker processes, or of clients at a time on a GPU; None for as many as there are cores.
        arms: Names of the arms to run; all if none are given.
        engine: Engine that trains and evaluates; the same in every call for a run, but for where the plan's own works.
        nodes: Function that opens other workers than processes, for the engine `flower`.
        most_rank_operations: Most multiplications that the ranks of the weights may take in a round that is not an
            arm's last; the same in every call for a run.
        on_start: Function that is called with the number of trainings to do, before the first.
        on_trained: Function that is called with the name of an arm and seed after each training.

    Returns:
        What every arm and seed has come to, by this call or an earlier one, in the order of the plan.

    Raises:
        InputError: The plan, its data or one of its bundles does not fit, the run can't grow to the plan, or it was
            begun with another engine.
        FedparaError: A bundle failed its verification, the disk refuses a write, or a worker was killed.
        KeyboardInterrupt: Interrupted.
    """
    plan, run = Path(plan), Path(run)
    found = read_plan(plan)
    wanted = [found.arm(name) for name in dict.fromkeys(arms)] or found.arms
    workers = cores() if workers is None else workers
    if workers < 1:
        raise InputError(f"workers: expected at least 1, found {workers}")
    with open_run(run, plan) as folder:
        journal = Journal(folder.metrics)
        pairs = [(arm, seed) for seed in found.seeds for arm in wanted if not _is_finished(journal, arm, seed)]
        with _explaining_killed_workers():
            _check_engine(run, journal, pairs, engine)
            jobs = _prepare(found, pairs, folder, journal, workers, most_rank_operations, engine)
            journal.revise(partial(_without_early_end, found))
            on_start(sum(len(job.trained(round)) for job in jobs for round in range(job.rounds_done, job.arm.rounds)))
            _run(jobs, folder, workers, on_trained, nodes=nodes, on_gpu=engine.on_gpu)
        journal.sort([arm.name for arm in found.arms], found.seeds)
        begun = [(arm.name, seed) for arm in found.arms for seed in found.seeds if journal.of(arm.name, seed, "done")]
        return [_outcome(journal, found, arm, seed) for arm, seed in begun]


def _check_engine(run: Path, journal: Journal, pairs: Sequence[tuple[Arm, int]], engine: EngineChoice) -> None:
    for arm, seed in pairs:
        for event in journal.of(arm.name, seed, "arm"):
            if (found := event.get("engine")) != engine.name:
                raise InputError(
                    f"expected {found or 'the engine of the plan'}, with which {run} has begun arm {arm.name}, found "
                    f"{engine.name or 'the engine of the plan'}; take another folder for another engine",
                    key="engine",
                )


def _is_finished(journal: Journal, arm: Arm, seed: int) -> bool:
    return any(is_finished(done, arm.rounds) for done in journal.of(arm.name, seed, "done"))


def _without_early_end(plan: Plan, event: Event) -> Event | None:
    """An event, unless it is the end of a federation that has more rounds by now."""
    is_end = event["event"] == "done" and not is_finished(event, plan.arm(event["arm"]).rounds)
    return None if is_end else event


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(
    plan: Plan,
    pairs: Sequence[tuple[Arm, int]],
    folder: RunFolder,
    journal: Journal,
    workers: int,
    most_rank_operations: int,
    engine: EngineChoice,
) -> list[Job]:
    clients = {seed: _clients(plan, folder, seed) for seed in dict.fromkeys(seed for _, seed in pairs)}
    missing = [(arm, seed) for arm, seed in pairs if not folder.job(arm.name, seed).bundle.exists()]
    for arm, seed in missing:
        if done := len(journal.of(arm.name, seed, "round")):
            raise InputError(
                f"{folder.job(arm.name, seed).path}: expected the files of the {counted(done, 'round')} that this "
                "run has, found "
                "them removed, so that it can't go on; take another folder"
            )
    if missing:
        with open_pool(min(workers, len(missing)), folder.lock) as pool:
            made = []
            for arm, seed in missing:
                job = folder.job(arm.name, seed)
                job.path.mkdir(parents=True, exist_ok=True)
                made.append((arm, pool.submit(make_model, replace(arm.model, seed=seed), job.bundle)))
            for arm, future in made:
                with _naming(arm, arm.name):
                    future.result()
    jobs = []
    for arm, seed in pairs:
        job = folder.job(arm.name, seed)
        with _naming(arm, arm.name):
            source = _torch_source(arm, seed, engine)
            model = Model(bundle=job.bundle, engine=arm.train.engine, torch=source)
            bundle = check_bundle(arm, model, clients[seed])
        jobs.append(
            Job(
                plan=plan,
                arm=arm,
                seed=seed,
                folder=job,
                bundle=bundle,
                clients=clients[seed],
                journal=journal,
                torch=source,
                most_rank_operations=most_rank_operations,
            )
        )
    return jobs


def _torch_source(arm: Arm, seed: int, engine: EngineChoice) -> TorchSource | None:
    if engine.engine != "torch":
        return None
    recipe = with_example_as_arrays(replace(arm.model, seed=seed))
    rows = -(-arm.train.batch_size // arm.train.micro_batches)
    return TorchSource(recipe=recipe, choice=engine, batch_rows=rows)


def _clients(plan: Plan, folder: RunFolder, seed: int) -> Clients:
    if not folder.data(seed).exists():
        write_clients(folder.data(seed), plan.data, seed)
    clients = read_clients(folder.data(seed))
    there = len(clients.clients)
    if plan.participants is not None and plan.participants > there:
        raise InputError(
            f"participants: expected at most the {counted(there, 'client')} there are, found {plan.participants}"
        )
    return clients


def _run(
    jobs: Sequence[Job],
    folder: RunFolder,
    workers: int,
    on_trained: OnTrained,
    *,
    nodes: OpenNodes | None,
    on_gpu: bool,
) -> None:
    if not jobs:
        return
    participants = len(jobs[0].participants(0))
    at_once = min(len(jobs), max(2, -(-TASKS_PER_WORKER * workers // participants)))
    if nodes is not None:
        nodes = partial(nodes, clients=max(len(job.clients.clients) for job in jobs))
    opening = _open_workers(workers, at_once, folder.lock, nodes=nodes, on_gpu=on_gpu)
    # Left in the reverse order: without the workers, the drivers have nothing to wait for.
    with ThreadPoolExecutor(at_once) as drivers, opening as opened:
        driven = [drivers.submit(_drive, replace(job, kept_engines=at_once), opened, on_trained) for job in jobs]
        try:
            done, _ = wait(driven, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            drivers.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _open_workers(count: int, jobs: int, lock: Path, *, nodes: OpenNodes | None, on_gpu: bool) -> Iterator[Workers]:
    """Workers for some jobs at a time."""
    if on_gpu or nodes is not None:
        opening = open_threads(count) if nodes is None else nodes(count, lock=lock)
        with open_pool(min(jobs, cores()), lock) as files, opening as engines:
            yield Workers(engines, files)
    else:
        with open_pool(count, lock) as pool:
            yield Workers(pool, pool)


def _drive(job: Job, workers: Workers, on_trained: OnTrained) -> None:
    with _naming(job.arm, job.name):
        run_job(job, workers, on_trained=on_trained)


def _outcome(journal: Journal, plan: Plan, arm: str, seed: int) -> Outcome:
    about, done = (journal.last(arm, seed, event) for event in ("arm", "done"))
    rounds = journal.of(arm, seed, "round")
    last = rounds[-1] if rounds and len(rounds) == plan.arm(arm).rounds else {}
    return Outcome(
        arm=arm,
        seed=seed,
        parameters=about.get("shared_parameters") or 0,
        rounds=len(rounds),
        accuracy=last.get("accuracy"),
        loss=last.get("loss"),
        up_bytes=sum(event.get("up_bytes") or 0 for event in rounds),
        down_bytes=sum(event.get("down_bytes") or 0 for event in rounds),
        diverged=done.get("diverged"),
    )


@contextmanager
def _naming(arm: Arm, where: str) -> Iterator[None]:
    """Have an error say what it is about: an option by its key in the plan, anything else by the arm and seed."""
    try:
        yield
    except FedparaError as error:
        if isinstance(error, InputError) and error.key is not None:
            raise error.under(f"arms.{arm.name}") from error
        named = copy(error)
        named.args = (f"arms.{where}: {error}",)
        raise named from error


@contextmanager
def _explaining_killed_workers() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise FedparaError(
            "simulation: expected the worker processes to end with their work, found one killed, perhaps for want of "
            "memory; the same command goes on from the last round, with fewer --workers if that was it"
        ) from error
