"""The record of a server's rounds: `metrics.jsonl` in its state folder, which is a run folder for `report` thereby.

The lines are those of `fedpara_edge.simulation.metrics`, of one arm. That of a round is made of its `result.json`, and
appended once its weights are evaluated. Whenever the server ends, what is missing is appended after the next start, so
that there is one line for each round that has a result.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from device_runtime.config import TrainCall
from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.errors import FedparaError
from fedpara_edge.serving.evaluating import Scores
from fedpara_edge.serving.folder import ServerFolder
from fedpara_edge.serving.rounds import read_result
from fedpara_edge.simulation.about import about_bundle
from fedpara_edge.simulation.folder import METRICS
from fedpara_edge.simulation.metrics import Event, Journal
from fedpara_edge.simulation.tasks.measure import measure_weights

ARM, SEED = "served", 0
"""Name and seed under which the rounds of a server stand in its metrics."""


class Evaluate(Protocol):
    """A function that evaluates weights, until it is stopped (`evaluating.Evaluator`)."""

    def __call__(self, weights: Path) -> Scores:
        """Evaluate weights."""
        ...

    def stop(self) -> None:
        """End, whatever it does."""
        ...


class Record:
    """The record of a federation.

    Args:
        folder: State folder of the server, which is locked.
        rounds: Rounds after which the federation is finished; None for no end.
        about: Fields of the metrics about the federation (`about`).
        evaluate: Function that evaluates weights; None to leave that out.
        on_event: Function that is told what happens.

    Raises:
        InputError: The metrics are damaged.
    """

    def __init__(
        self,
        folder: ServerFolder,
        rounds: int | None,
        about: Mapping[str, Any],
        *,
        evaluate: Evaluate | None,
        on_event: Callable[..., None],
    ) -> None:
        self._folder, self._rounds, self._about = folder, rounds, about
        self._evaluate, self._tell = evaluate, on_event
        self._journal = Journal(folder.path / METRICS)
        self._evaluating: Event | None = None
        self._writing = threading.Lock()
        self._is_stopped = False

    @property
    def rounds(self) -> list[Event]:
        """Lines about the rounds, and the one about the round whose weights are being evaluated, from the first on."""
        found, evaluating = self._journal.of(ARM, SEED, "round"), self._evaluating
        is_new = evaluating is not None and (not found or found[-1]["round"] < evaluating["round"])
        return [*found, evaluating] if is_new and evaluating is not None else found

    @property
    def is_evaluated(self) -> bool:
        """Whether weights are evaluated."""
        return self._evaluate is not None

    @property
    def is_evaluating(self) -> bool:
        """Whether the last of the rounds is still to be evaluated."""
        return self._evaluating is not None and self._evaluate is not None

    def catch_up(self, number: int, devices: int) -> None:
        """Append what is missing of the rounds before one.

        Args:
            number: Number of rounds that are done.
            devices: Number of devices that joined.

        Raises:
            FedparaError: The disk refuses a write, or a file is damaged.
        """
        with self._writing:
            for done in range(len(self._journal.of(ARM, SEED, "round")), number):
                self._append(done, devices)
                if self._is_stopped:
                    return
            is_done = self._rounds is not None and number >= self._rounds
            if not is_done and self._journal.of(ARM, SEED, "done"):
                self._journal.revise(lambda event: None if event["event"] == "done" else event)
            if is_done and number and not self._journal.of(ARM, SEED, "done"):
                rounds = self._journal.of(ARM, SEED, "round")
                seconds = sum(event.get("seconds") or 0 for event in rounds)
                self._journal.append(_event("done", rounds=number, seconds=seconds, diverged=None))

    def stop(self) -> None:
        """Leave what is under way to the next start."""
        self._is_stopped = True
        if self._evaluate is not None:
            self._evaluate.stop()

    def _append(self, number: int, devices: int) -> None:
        """Append the line of a round that is done, evaluated."""
        result = read_result(self._folder.round(number)) or {}
        event = {**_of_round(number + 1, result), **self._measures(number + 1)}
        self._evaluating = event
        self._tell("round_recorded", level=logging.DEBUG, round=number + 1)
        try:
            scores = self._scores(number + 1)
            if self._is_stopped:
                return
            if not self._journal.of(ARM, SEED, "arm"):
                counts = {"clients": devices, "left_out": 0, "participants": event["participants"]}
                self._journal.append(_event("arm", **self._about, **counts, rounds=self._rounds))
            self._journal.append({**event, **scores})
        finally:
            self._evaluating = None

    def _scores(self, number: int) -> Mapping[str, float | None]:
        """Accuracy and loss of the weights after some rounds."""
        if self._evaluate is None:
            return {}
        try:
            found = self._evaluate(self._folder.weights(number))
        except FedparaError as error:
            if not self._is_stopped:
                self._tell("error", level=logging.ERROR, code=error.code, message=f"round {number}: {error}")
            return {}
        self._tell("round_evaluated", round=number, **vars(found))
        return {"accuracy": found.accuracy, "loss": found.loss}

    def _measures(self, number: int) -> Mapping[str, Any]:
        weights, bundle = self._folder.weights(number), self._folder.bundle.path
        return vars(measure_weights(bundle=bundle, weights=weights, state=None, most_operations=0))


def about(folder: ServerFolder, settings: Mapping[str, Any], aggregate: AggregateConfig) -> dict[str, Any]:
    """The fields of the metrics about a federation, but for those of its devices.

    Args:
        folder: State folder, with the bundle.
        settings: Options of the devices' training, by name.
        aggregate: Aggregation of their updates.
    """
    return about_bundle(folder.bundle.manifest, TrainCall(**settings), aggregate)


def _event(kind: str, /, **values: Any) -> dict[str, Any]:
    return {"event": kind, "arm": ARM, "seed": SEED, **values}


def _of_round(number: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """The line about a round, but for what is measured of its weights; null where its result does not tell."""
    accepted, refused = result.get("accepted", []), result.get("refused", {})
    rejections = Counter(refused.values())
    losses = [(each["metrics"]["loss"], each["examples"]) for each in accepted if "loss" in each["metrics"]]
    examples = sum(count for _, count in losses)
    gap, refit = (result.get("gap") or {}).get("relative"), result.get("refit") or {}
    received = [result.get(name, 0) for name in ("received_bytes", "rejected_bytes", "refused_bytes")]
    is_known = "opened" in result
    return _event(
        "round",
        round=number,
        accuracy=None,
        loss=None,
        train_loss=sum(loss * count for loss, count in losses) / examples if examples else None,
        up_bytes=sum(received) if is_known else None,
        down_bytes=result.get("sent_bytes"),
        participants=result.get("asked"),
        updates=len(accepted),
        rejected=rejections.total(),
        rejections=dict(sorted(rejections.items())),
        stragglers=len(result.get("stragglers", [])),
        examples=result.get("examples"),
        dense_bytes=result.get("dense_bytes"),
        train_seconds=None,
        gap=refit.get("after", gap),
        mean_gap=refit.get("before", gap),
        weights_bytes=result.get("weights_bytes"),
        change_bytes=result.get("change_bytes"),
        spent=(result.get("privacy") or {}).get("spent"),
        seconds=result["ended"] - result["opened"] if is_known else None,
    )
