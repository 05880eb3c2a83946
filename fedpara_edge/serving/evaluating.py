"""A process that evaluates the weights of each round, so that the server answers meanwhile."""

from __future__ import annotations

import multiprocessing
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from device_runtime.sources import Reading
from fedpara_edge.errors import DivergedError, FedparaError, InputError
from fedpara_edge.formats.bundle import Bundle, open_bundle


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How good weights are.

    Args:
        accuracy: Share of the labels that are right; None where that means nothing, or the loss is not finite.
        loss: Mean loss; None where it is not finite.
        examples: Number of examples.
    """

    accuracy: float | None
    loss: float | None
    examples: int


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Data to evaluate on.

    Args:
        data: Source of the data.
        reading: Options of how it is read.
        threads: Threads of the engine; None for one per core.
    """

    data: Path
    reading: Reading
    threads: int | None = None


class Evaluator:
    """A process with an engine and the test data, made anew if it was lost.

    Args:
        bundle: Bundle that the weights belong to.
        test: Data to evaluate on.

    Raises:
        InputError: The data does not fit, or each device has a model of its own.
        FedparaError: No engine runs here.
    """

    def __init__(self, bundle: Bundle, test: EvaluationSet) -> None:
        if bundle.manifest.layout.with_role("personal"):
            raise InputError("expected none, as each device has a model of its own, found some", key="test")
        self._bundle, self._test = bundle.path, test
        self._is_stopped = False
        self._start()

    def __call__(self, weights: Path) -> Scores:
        """Evaluate weights.

        Raises:
            FedparaError: The weights are damaged, or the process ended.
        """
        if not self._process.is_alive() and not self._is_stopped:
            self._start()
        with suppress(OSError):  # the process has ended, of which the answer tells
            self._pipe.send(weights)
        found = self._answer()
        assert isinstance(found, Scores)
        return found

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._is_stopped = True
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, self._bundle, self._test), daemon=True)
        self._process.start()
        there.close()
        self._answer()

    def _answer(self) -> Scores | str:
        try:
            found: Scores | str | FedparaError = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise FedparaError(
                "test: expected a process that evaluates, found that it ended; is there enough memory?"
            ) from error
        if isinstance(found, FedparaError):
            raise found
        return found


def _work(pipe: Connection, bundle: Path, test: EvaluationSet) -> None:
    """Evaluate what comes through a pipe, until nobody is at its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the server that ends
    from device_runtime.data import open_data
    from device_runtime.engines.registry import open_engine
    from device_runtime.evaluation import evaluate

    try:
        opened = open_bundle(bundle)
        engine, data = open_engine(opened, threads=test.threads), open_data(test.data, opened.manifest, test.reading)
    except FedparaError as error:
        pipe.send(error)
        return
    pipe.send("ready")
    with suppress(EOFError, OSError):
        while True:
            weights = pipe.recv()
            try:
                found = evaluate(engine, data, weights=weights)
                pipe.send(Scores(accuracy=found.accuracy, loss=found.loss, examples=found.examples))
            except DivergedError:
                pipe.send(Scores(accuracy=None, loss=None, examples=data.examples))
            except FedparaError as error:
                pipe.send(error)
