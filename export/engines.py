"""Files of several engines: written, verified, and an engine that can't left out where none was named."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.attempts import EngineError
from export.trials import OpenTrial
from export.verify import Verification
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.formats.bundle import ENGINES, FORMS, ONNXRUNTIME_FILES, ORT_TRAINING_FILES

FILES = {"onnxruntime": (*ONNXRUNTIME_FILES, *FORMS.values()), "ort-training": ORT_TRAINING_FILES}

Writer = Callable[[Path], OpenTrial]
"""Function that writes the files of an engine into a folder and returns one that loads them."""
Verify = Callable[[Mapping[str, OpenTrial]], dict[str, Verification]]


@dataclass(frozen=True)
class EngineWriters:
    """Ways to write the files of engines, and to verify them.

    Args:
        writers: Writers by engine.
        verify: Function that verifies what was written, together.
    """

    writers: Mapping[str, Writer]
    verify: Verify

    def write(self, folder: Path, engines: Sequence[str]) -> dict[str, Verification]:
        """Write the files of all of some engines.

        Raises:
            FedparaError: One of them can't. The error names another that can.
        """
        try:
            return self.verify({engine: self._opener(engine, folder) for engine in engines})
        except EngineError as failure:
            others = (engine for engine in ENGINES if engine not in engines and self._can(engine))
            raise _recommending(failure.error, next(others, None)) from failure.error

    def write_possible(self, folder: Path) -> tuple[dict[str, Verification], dict[str, FedparaError]]:
        """Write the files of every engine that can; return why the others can't, by engine.

        Raises:
            FedparaError: None of them can.
        """
        openers: dict[str, OpenTrial] = {}
        left_out: dict[str, FedparaError] = {}
        for engine in self.writers:
            try:
                openers[engine] = self._opener(engine, folder)
            except EngineError as failure:
                left_out[engine] = failure.error
        while openers:
            try:
                verification = self.verify(openers)
            except EngineError as failure:
                left_out[failure.engine] = failure.error
                del openers[failure.engine]
            else:
                for name in (name for engine in left_out for name in FILES[engine]):
                    (folder / name).unlink(missing_ok=True)
                return verification, left_out
        raise next(iter(left_out.values()))

    def _opener(self, engine: str, folder: Path) -> OpenTrial:
        try:
            return self.writers[engine](folder)
        except FedparaError as error:
            raise EngineError(engine, error) from error

    def _can(self, engine: str) -> bool:
        if engine not in self.writers:
            return False
        with tempfile.TemporaryDirectory() as scratch:
            try:
                self.verify({engine: self._opener(engine, Path(scratch))})
            except EngineError:
                return False
        return True


def _recommending(error: FedparaError, engine: str | None) -> FedparaError:
    """The same error, with an engine that can what another can't."""
    if engine is None:
        return error
    remedy = f"{engine} can train it: --engines {engine}"
    if isinstance(error, InputError):
        return type(error)(f"{error.detail}; {remedy}", key=error.key)
    return type(error)(f"{error}; {remedy}")
