"""Attempts to load and run the files of an engine, and why one failed, for the user."""

from __future__ import annotations

import re

from export.apart import CrashError
from export.batches import Batch
from export.complaints import complaint
from export.forward.graph import ForwardGraph
from export.trials import OpenTrial, Results, Trial
from fedpara_edge.errors import FedparaError, InputError, counted

_NODE = re.compile(r"Name:'(?P<name>[^']*?)(_Grad/[^']*)?'")


class EngineError(Exception):
    """An engine can't train the model, or not right.

    Attributes:
        engine: Name of the engine.
        error: Error for the user.
    """

    def __init__(self, engine: str, error: FedparaError) -> None:
        super().__init__(str(error))
        self.engine, self.error = engine, error


def open_trial(engine: str, opener: OpenTrial) -> Trial:
    """The files of an engine, loaded.

    Raises:
        EngineError: The engine doesn't load them.
        OSError: The disk refuses a read or a write.
    """
    try:
        return opener()
    except FedparaError as error:
        raise EngineError(engine, error) from error
    except OSError:
        raise
    except Exception as error:  # the exceptions of the runtimes have no common base
        refusal = InputError(f"model: expected one that {engine} loads, found {complaint(error)} (nothing was written)")
        raise EngineError(engine, refusal) from error


def run_trial(engine: str, trial: Trial, batch: Batch, graph: ForwardGraph) -> Results:
    """What an engine computes on a batch.

    Args:
        engine: Name of the engine.
        trial: Files of the engine, loaded.
        batch: Batch to run.
        graph: Forward pass that the files were made from, for errors.

    Raises:
        EngineError: The engine doesn't run them.
        OSError: The disk refuses a read or a write.
    """
    try:
        return trial.run(batch)
    except FedparaError as error:
        raise EngineError(engine, error) from error
    except OSError:
        raise
    except CrashError as error:
        refusal = InputError(f"model: expected one that {engine} trains, found {error} (nothing was written)")
        raise EngineError(engine, refusal) from error
    except Exception as error:  # the exceptions of the runtimes have no common base
        node = _NODE.search(str(error))
        place = "the model" if node is None or node["name"] not in graph.module_of else graph.place_of(node["name"])
        remedy = (
            "take sizes from x.shape, not from the example, and name the axes of a squeeze()"
            if batch.rows == 1
            else "take sizes from x.shape, not from the example"
        )
        refusal = InputError(
            f"{place}: expected to run in {engine} on any batch, found with {rows_of(batch)} {complaint(error)}; "
            f"{remedy} (nothing was written)"
        )
        raise EngineError(engine, refusal) from error


def rows_of(batch: Batch) -> str:
    """Number of rows of a batch, in words."""
    return counted(batch.rows, "row")
