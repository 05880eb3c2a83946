"""The rounds of a fleet on the server, one after the other until the plan is done.

The updates of a round are gathered in files, the next weights are made of them, and a line in the metrics makes the
round count.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpara_edge.fleet.exchange import Exchange
from fedpara_edge.fleet.federation import Federation, open_federation
from fedpara_edge.fleet.gathering import Gathered, Say, gather, wait_for_devices
from fedpara_edge.fleet.settings import FleetConfig
from fedpara_edge.simulation.about import about
from fedpara_edge.simulation.tasks.aggregate import aggregated, write_round
from fedpara_edge.simulation.tasks.measure import measure_weights

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from device_runtime.evaluation import Evaluation
    from fedpara_edge.aggregation import Round

Evaluate = Callable[[Path], "Evaluation"]


def run_fleet(grid: Grid, config: FleetConfig, say: Say = lambda _: None) -> None:
    """Run the rounds that are left.

    Args:
        grid: Flower's grid.
        config: Settings.
        say: Function that is called with what goes wrong with a device, a line each.

    Raises:
        InputError: The plan, the bundle or the run do not go together.
        BusyError: Another process works in the run folder.
        TooFewUpdatesError: Too few devices are there, or sent an update that can be used.
        DivergedError: There are no next weights.
        FedparaError: A file is damaged, or the disk refuses a write.
    """
    with open_federation(config) as federation:
        evaluate = _evaluator(federation, config)
        exchange = Exchange(grid, at_once=config.at_once)
        journal, rounds = federation.journal, federation.arm.rounds
        journal.revise(lambda event: None if event["event"] == "done" else event)
        if federation.rounds_done < rounds:
            wait_for_devices(grid, config.nodes, config.wait_seconds)
        if not federation.events("arm"):
            journal.append(_arm_event(federation, config))
        for round in range(federation.rounds_done, rounds):
            started = time.monotonic()
            federation.tidy(round)
            gathered = gather(grid, exchange, federation, config, round, say)
            event = _finish_round(federation, config, round, gathered, evaluate, say)
            journal.append({**event, "seconds": time.monotonic() - started})
        seconds = sum(event.get("seconds") or 0 for event in federation.events("round"))
        journal.append(federation.event("done", rounds=rounds, seconds=seconds, diverged=None))


def _finish_round(
    federation: Federation,
    config: FleetConfig,
    round: int,
    gathered: Gathered,
    evaluate: Evaluate | None,
    say: Say,
) -> dict[str, Any]:
    """Make the next weights and evaluate them; the event of the round."""
    number = round + 1
    done = write_round(
        federation.folder,
        gathered.updates,
        round=round,
        weights=federation.weights(round),
        config=federation.config(clients=config.nodes, min_updates=config.min_updates),
        gate=federation.make_gate(),
        budget=federation.budget,
    )
    for update in done.aggregation.rejected:
        say(f"round {number}: rejected [{update.code}] {update.error}")
    due = evaluate is not None and federation.plan.is_evaluated(number, last=federation.arm.rounds)
    evaluation = evaluate(federation.weights(number)) if evaluate is not None and due else None
    return _round_event(federation, number, gathered, done, evaluation)


def _evaluator(federation: Federation, config: FleetConfig) -> Evaluate | None:
    """The function that evaluates weights on the test data; None without data, or where each device has its own model.

    Raises:
        FedparaError: The data does not fit, or no engine runs here.
    """
    if config.test is None or federation.bundle.manifest.layout.with_role("personal"):
        return None
    from device_runtime.data import open_data
    from device_runtime.engines.registry import open_engine
    from device_runtime.evaluation import evaluate

    engine = open_engine(federation.bundle, federation.arm.train.engine)
    data = open_data(config.test, federation.bundle.manifest)
    return lambda weights: evaluate(engine, data, weights=weights)


def _arm_event(federation: Federation, config: FleetConfig) -> dict[str, Any]:
    return federation.event(
        "arm",
        **about(federation.arm, federation.bundle.manifest.layout),
        clients=config.nodes,
        left_out=0,
        participants=min(federation.plan.participants or config.nodes, config.nodes),
    )


def _round_event(
    federation: Federation, number: int, gathered: Gathered, done: Round, evaluation: Evaluation | None
) -> dict[str, Any]:
    result, weights = done.aggregation, federation.weights(number)
    examples = sum(update.examples for update in result.accepted)
    losses = sum(update.metrics.get("loss", 0.0) * update.examples for update in result.accepted)
    rejections = gathered.failures + Counter(update.code for update in result.rejected)
    return federation.event(
        "round",
        round=number,
        accuracy=None if evaluation is None else evaluation.accuracy,
        loss=None if evaluation is None else evaluation.loss,
        train_loss=losses / examples,
        train_seconds=sum(gathered.seconds) / len(gathered.seconds) if gathered.seconds else None,
        up_bytes=result.received_bytes + result.rejected_bytes,
        down_bytes=gathered.down_bytes,
        participants=gathered.participants,
        rejected=rejections.total(),
        rejections=dict(sorted(rejections.items())),
        **vars(aggregated(done)),
        **vars(measure_weights(bundle=federation.bundle.path, weights=weights, state=None, most_operations=0)),
    )
