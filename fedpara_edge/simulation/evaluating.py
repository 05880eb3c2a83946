"""How good a round's weights are: tasks that evaluate them, and their results put together.

Where the clients have one model, a common test set is cut into pieces that the workers share; where each has its own,
every client's is evaluated on all of it. Own test shares are evaluated client by client, each with its personal
tensors; only these results are told apart by client.
"""

from __future__ import annotations

from fedpara_edge.simulation.job import Job
from fedpara_edge.simulation.processes import Workers
from fedpara_edge.simulation.tasks.evaluate import Tally, add_up, evaluate_weights

PIECE_ROWS = 512
"""Rows of a common test set in one task: whole batches, and as many whatever the number of workers, so that this
changes no bit."""


def evaluate_round(job: Job, workers: Workers, number: int) -> tuple[Tally, dict[str, Tally]]:
    """The evaluation of the weights after `number` rounds, and that of each client with a test share of its own.

    Args:
        job: The federation.
        workers: Workers.
        number: Number of rounds.

    Raises:
        FedparaError: A file is damaged.
    """
    on_common = job.plan.evaluated_on == "common"
    each = _evaluate_clients(job, workers, number, on_common=on_common and job.has_own_models)
    if on_common and job.has_own_models:
        return add_up(each.values()), {}
    return _evaluate_common(job, workers, number) if on_common else add_up(each.values()), each


def _evaluate_common(job: Job, workers: Workers, number: int) -> Tally:
    rows = job.clients.test_examples
    pieces = [
        workers.engines.submit(
            evaluate_weights,
            model=job.model,
            weights=job.weights_of("", number),
            data=job.clients.common,
            rows=(start, min(start + PIECE_ROWS, rows)),
        )
        for start in range(0, rows, PIECE_ROWS)
    ]
    return add_up(piece.result() for piece in pieces)


def _evaluate_clients(job: Job, workers: Workers, number: int, *, on_common: bool) -> dict[str, Tally]:
    clients = [client.name for client in job.clients.clients if on_common or client.test_examples]
    tallies = {
        client: workers.engines.submit(
            evaluate_weights,
            model=job.model,
            weights=job.weights_of(client, number),
            data=job.clients.common if on_common else job.clients.test(client),
            state=job.state_of(client),
        )
        for client in clients
    }
    return {client: tally.result() for client, tally in tallies.items()}
