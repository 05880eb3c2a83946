"""How good a round's weights are: the tasks that evaluate them, and their results put together.

Where the clients have one model, a common test set is cut into pieces that the workers share; where each has its own,
every client's is judged on all of it. Own test shares are judged client by client, each with its personal tensors; only
these scores are told apart by client.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from fedpara_edge.simulation.job import Job
from fedpara_edge.simulation.tasks.judging import PIECE_ROWS, Judging, Score, add_up, judge

CLIENTS_AT_ONCE = 16
"""Whom one worker judges in a row: enough to be worth a task, few enough to be shared out."""


def evaluate_round(job: Job, pool: Executor, number: int) -> tuple[Score, dict[str, Score]]:
    """The score of the weights after `number` rounds, and that of each client on its own test share, if it has one.

    Args:
        job: the federation.
        pool: worker processes.
        number: of rounds.

    Raises:
        FedparaError: a file is damaged.
    """
    on_common = job.plan.judged_on == "common"
    each = _judge_clients(job, pool, number, on_common=on_common and job.has_own_models)
    if on_common and job.has_own_models:
        return add_up(each.values()), {}
    return add_up(_judge_common(job, pool, number) if on_common else each.values()), each


def _judge_common(job: Job, pool: Executor, number: int) -> list[Score]:
    rows, weights = job.clients.test_examples, job.weights_of("", number)
    pieces = [
        Judging(model=job.model, weights=weights, data=job.clients.common, rows=(start, min(start + PIECE_ROWS, rows)))
        for start in range(0, rows, PIECE_ROWS)
    ]
    return _gather(pool, [[piece] for piece in pieces])


def _judge_clients(job: Job, pool: Executor, number: int, *, on_common: bool) -> dict[str, Score]:
    clients = [client.name for client in job.clients.clients if on_common or client.test_examples]
    judgings = [
        Judging(
            model=job.model,
            weights=job.weights_of(client, number),
            data=job.clients.common if on_common else job.clients.test(client),
            state=job.state_of(client),
        )
        for client in clients
    ]
    tasks = [judgings[start : start + CLIENTS_AT_ONCE] for start in range(0, len(judgings), CLIENTS_AT_ONCE)]
    return dict(zip(clients, _gather(pool, tasks), strict=True))


def _gather(pool: Executor, tasks: Sequence[Sequence[Judging]]) -> list[Score]:
    futures = [pool.submit(judge, task) for task in tasks]
    return [score for future in futures for score in future.result()]
