"""The files of a round on the server: what `aggregate` needs is read from them, and what comes of it is written.

The order of writing is change, state, weights, so that where the weights of a round are, all that belongs with them is.

The codec of a downlink decodes to other weights than the server made. These *published* weights are those of the next
round, and what they lack is kept in the server state and sent with the next change (error feedback).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedpara_edge.aggregation.fedavg import Aggregation
from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.codecs.codec import Encoder
from fedpara_edge.errors import InputError
from fedpara_edge.formats.change import publish
from fedpara_edge.formats.serverstate import (
    RESIDUAL,
    ServerState,
    read_state_for,
    state_of,
    state_path,
    write_server_state,
)
from fedpara_edge.formats.weights import Weights, write_weights
from fedpara_edge.storage.atomic import check_output


@dataclass(frozen=True, kw_only=True)
class Downlink:
    """How the next weights are sent as a change.

    Args:
        encoder: the codec.
        change: the change file to write.
    """

    encoder: Encoder
    change: Path


@dataclass(frozen=True, kw_only=True)
class RoundFiles:
    """Where the files of a round are.

    Args:
        weights: the next weights.
        state: the server's state folder; None if nothing is kept.
        downlink: None to send whole weights.
    """

    weights: Path
    state: Path | None = None
    downlink: Downlink | None = None

    def begin(self, base: Weights, algorithm: ServerAlgorithm, *, overwrite: bool) -> ServerState | None:
        """Refuse what can't be written, and read the state of the round before.

        Args:
            base: the weights of the round before.
            algorithm: the server algorithm.
            overwrite: whether the files to write may exist.

        Returns:
            The state, None if there is none, at round 0 or without a folder.

        Raises:
            InputError: a file exists or can't be written; the folder or the state is missing; or the downlink changed
                with something left to send.
            WrongBundleError: the state is damaged or belongs with other weights.
        """
        self._check_apart(base.round + 1)
        for path in (self.weights, *([] if self.downlink is None else [self.downlink.change])):
            check_output(path, overwrite=overwrite)
        if self.state is None:
            if algorithm.groups or self.downlink is not None:
                keeper = f"algorithm {algorithm.name}" if algorithm.groups else "downlink codec"
                raise InputError(f"{keeper}: expected a folder for what the server keeps, found none; pass --state")
            return None
        try:
            self.state.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.state}: expected a writable state folder, found {error.strerror}; choose another"
            ) from error
        check_output(state_path(self.state, base.round + 1), overwrite=overwrite)
        state = read_state_for(self.state, base)
        if state is not None and RESIDUAL in state.groups and self.downlink is None:
            raise InputError(
                f"{state_path(self.state, base.round)}: expected --downlink-codec as in the round before, whose change "
                "left something to send, found none; with float32 it leaves nothing"
            )
        return state

    def _check_apart(self, round: int) -> None:
        """None of the files may be written over another."""
        paths = {"weights": self.weights}
        if self.downlink is not None:
            paths["change"] = self.downlink.change
        if self.state is not None:
            paths["server state"] = state_path(self.state, round)
        names: dict[Path, str] = {}
        for name, path in paths.items():
            if (other := names.setdefault(path.absolute().resolve(), name)) != name:
                raise InputError(f"{path}: expected a file of its own for the {name}, found that of the {other}")

    def commit(self, result: Aggregation, base: Weights, state: ServerState | None) -> Aggregation:
        """Write the round.

        Args:
            result: of `aggregate`.
            base: the weights of the round before.
            state: what `begin` returned.

        Returns:
            The aggregation with the weights and the state that were written.

        Raises:
            FedparaError: the disk refuses a write.
        """
        weights, groups = result.weights, {} if result.state is None else dict(result.state.groups)
        if self.downlink is not None:
            residual = None if state is None else state.groups.get(RESIDUAL)
            published = publish(self.downlink.change, base, weights, self.downlink.encoder, residual=residual)
            weights = published.weights
            if any(tensor.any() for tensor in published.residual.values()):
                groups[RESIDUAL] = published.residual
        kept = None
        if self.state is not None:
            kept = state_of(weights, result.algorithm, groups)
            write_server_state(state_path(self.state, weights.round), kept)
        write_weights(self.weights, weights)
        return replace(result, weights=weights, state=kept)
