"""The server state: what a server keeps besides the weights of a round, for the next one.

Format `fedpara-edge/server-state`, version 1 (container: `storage.tensorfile`). Header:

    format, version
    fingerprint   fingerprint of the bundle, hexadecimal
    round         round of the weights that it belongs with
    base          SHA-256 of those weights (`weights`)
    algorithm     {"name": text, "options": {name: number}}: the server algorithm that wrote it (`algorithms`)
    history       past rounds (`formats.history`); left out unless late updates may count
    digest        as in `storage.digest`

and float32 tensors `<group>/<name>`, all finite: in each group one for every shared tensor, under its name and in its
shape. The groups are those of the algorithm (`momentum`; `moment1` and `moment2`; `control`; `h`) and `residual`, what
a lossy codec of the downlink has not sent yet. Without groups, as plain FedAvg has it, the file has no tensors.

A state *folder* of the server holds `round-<round>.safetensors` for every round after 0, where all groups have their
first values, or for the newest of them. For the device, the file of a round is SCAFFOLD's control variate of that
round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms import SERVER, ServerAlgorithm
from fedpara_edge.codecs.codec import not_finite
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError, brief_text
from fedpara_edge.formats.history import History, history_from_json, history_to_json
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.digest import content_digest, read_checked, with_digest
from fedpara_edge.storage.rounds import round_path, rounds_in
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

FORMAT = "fedpara-edge/server-state"
RESIDUAL = "residual"
CHANGEABLE = frozenset({"lr"})
"""Options that may differ from round to round, as nothing that is kept depends on them."""

Group = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """The content of a server state file.

    Args:
        fingerprint: Fingerprint of the bundle.
        round: Round of the weights that it belongs with.
        base: SHA-256 of those weights, hexadecimal.
        algorithm: Name of the server algorithm.
        options: Options of the server algorithm.
        groups: Arrays by group and shared tensor, float32.
        history: Past rounds of which updates may count.
    """

    fingerprint: str
    round: int
    base: str
    algorithm: str
    options: Mapping[str, Any]
    groups: Mapping[str, Group] = field(default_factory=dict)
    history: History = field(default_factory=dict)

    def check_weights(self, weights: Weights) -> None:
        """Compare with the weights that it is to be used with.

        Raises:
            WrongBundleError: The state belongs with others, or a tensor does not fit.
        """
        for name in ("fingerprint", "round", "base"):
            expected, found = getattr(weights, name), getattr(self, name)
            if expected != found:
                raise WrongBundleError(
                    f"server state: {name}: expected {brief_text(expected, max_length=12)} as the weights have it, "
                    f"found {brief_text(found, max_length=12)}; "
                    "take the state and the weights of one round"
                )
        shapes = {tensor.name: tensor.shape for tensor in weights.layout.shared}
        for group, tensors in self.groups.items():
            found_shapes = {name: tensor.shape for name, tensor in tensors.items()}
            if found_shapes != shapes:
                name = min(set(shapes.items()) ^ set(found_shapes.items()))[0]
                raise WrongBundleError(
                    f"server state: tensor {f'{group}/{name}'!r}: expected shape {shapes.get(name)}, "
                    f"found {found_shapes.get(name)}; take a state that aggregate wrote"
                )

    def check_algorithm(self, algorithm: ServerAlgorithm) -> None:
        """Compare with the algorithm that is to go on from it.

        Raises:
            InputError: The algorithm is another, or has options with which what is kept means something else.
            WrongBundleError: The groups are not the algorithm's.
        """
        remedy = "go on as in the rounds before, or begin again from round 0"
        if self.algorithm != algorithm.name:
            raise InputError(
                f"algorithm: expected {self.algorithm} as in round {self.round}, found {algorithm.name}; {remedy}"
            )
        found = algorithm.options()
        for option in sorted(self.options.keys() | found.keys()):
            if option not in CHANGEABLE and self.options.get(option) != found.get(option):
                raise InputError(
                    f"{brief_text(option)}: expected {brief_text(self.options.get(option))} as in round {self.round}, "
                    f"found {found.get(option)}; {remedy}"
                )
        groups = set(self.groups) - {RESIDUAL}
        if groups != set(algorithm.groups):
            raise WrongBundleError(
                f"server state: expected the groups {', '.join(algorithm.groups) or 'none'} of {algorithm.name}, "
                f"found {', '.join(map(brief_text, sorted(groups))) or 'none'}; take a state that aggregate wrote"
            )


def state_of(weights: Weights, algorithm: ServerAlgorithm, groups: Mapping[str, Group]) -> ServerState:
    """The state that belongs with some weights."""
    return ServerState(
        fingerprint=weights.fingerprint,
        round=weights.round,
        base=weights.base,
        algorithm=algorithm.name,
        options=algorithm.options(),
        groups=groups,
    )


def write_server_state(path: Path, state: ServerState, *, overwrite: bool = True) -> None:
    """Write a server state file, atomically.

    Args:
        path: File to write.
        state: State to store.
        overwrite: Whether to replace an existing file that has other content.

    Raises:
        OutputExistsError: The file exists with other content, and `overwrite` is false.
        FedparaError: A value is not finite, or the disk refuses the write.
    """
    tensors = {f"{group}/{name}": tensor for group, named in state.groups.items() for name, tensor in named.items()}
    if (bad := not_finite(tensors)) is not None:
        raise FedparaError(f"{path}: tensor {bad!r}: expected a finite state, found NaN or Inf; nothing was written")
    header = {
        "format": FORMAT,
        "version": 1,
        "fingerprint": state.fingerprint,
        "round": state.round,
        "base": state.base,
        "algorithm": {"name": state.algorithm, "options": dict(state.options)},
        **({"history": history_to_json(state.history)} if state.history else {}),
    }
    write_tensors(path, tensors, with_digest(header, content_digest(tensors)), overwrite=overwrite)


def read_server_state(path: Path, *, only: Collection[str] | None = None) -> ServerState:
    """Read and verify a server state file.

    Args:
        path: Server state file.
        only: Groups to read, of those that are there; None for all.

    Raises:
        WrongBundleError: The file is damaged or of another format, a header field or the name, dtype or group of a
            tensor is impossible, or a value is not finite.
        InputError: The file is missing.
    """
    with TensorFile(path, format=FORMAT, error=WrongBundleError, remedy="copy it again") as file:
        header = _header_of(file)
        known = {*SERVER[header.algorithm].groups, RESIDUAL}
        for name, entry in file.entries.items():
            group, _, tensor = name.partition("/")
            if group not in known or not tensor or entry.dtype != "float32":
                raise WrongBundleError(
                    f"{path}: tensor {name!r}: expected float32 in a group of {', '.join(sorted(known))}, "
                    f"found {entry.dtype}; take a state that aggregate wrote"
                )
        wanted = [name for name in file.entries if only is None or name.partition("/")[0] in only]
        tensors = read_checked(file, wanted)
    if (bad := not_finite(tensors)) is not None:
        raise WrongBundleError(
            f"{path}: tensor {bad!r}: expected a finite state, found NaN or Inf; use that of another round"
        )
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    for name, values in tensors.items():
        group, _, tensor = name.partition("/")
        groups.setdefault(group, {})[tensor] = values
    return replace(header, groups=groups)


def write_control(path: Path, state: ServerState | None) -> None:
    """Write what devices need of a server state, the control variate of scaffold; nothing where there is none.

    The server's own file may have more in it.

    Raises:
        FedparaError: The disk refuses the write.
    """
    from fedpara_edge.algorithms.scaffold import CONTROL

    if state is not None and CONTROL in state.groups:
        write_server_state(path, replace(state, groups={CONTROL: state.groups[CONTROL]}))


def read_state_for(folder: Path, weights: Weights) -> ServerState | None:
    """The state in a folder that belongs with some weights; None if the folder's states begin after them.

    Raises:
        InputError: The state is missing, though those of earlier rounds are there, or it was removed.
        WrongBundleError: The state is damaged, or belongs with other weights.
    """
    path, number = round_path(folder, weights.round), weights.round
    if not path.exists():
        rounds = rounds_in(folder)
        earlier = [round for round in rounds if round < number]
        if earlier:
            raise InputError(
                f"{path}: expected the server state of round {number}, found that of round {max(earlier)}; "
                "aggregate the rounds between with the state folder as well, or begin with an empty one"
            )
        # The next round's alone is there if a folder is first used for that round, which is done again now.
        if number and rounds and max(rounds) > number + 1:
            raise InputError(
                f"{path}: expected the server state of round {number}, found those from round {min(rounds)} to "
                f"{max(rounds)}: older ones were removed; go on from newer weights, or begin with an empty folder"
            )
        return None
    state = read_server_state(path)
    try:
        state.check_weights(weights)
    except WrongBundleError as error:
        raise WrongBundleError(f"{path}: {error}") from error
    return state


def _header_of(file: TensorFile) -> ServerState:
    header = file.header
    algorithm = header.get("algorithm")
    name, options = (algorithm.get("name"), algorithm.get("options")) if isinstance(algorithm, dict) else (None, None)
    checks = {
        "fingerprint": isinstance(header.get("fingerprint"), str),
        "base": isinstance(header.get("base"), str),
        "round": type(header.get("round")) is int and 0 <= header["round"] <= 1 << 40,
        "algorithm": isinstance(name, str) and name in SERVER and isinstance(options, dict),
    }
    try:
        history = history_from_json(header.get("history", []))
    except ValueError:
        checks["history"] = False
    wrong = next((name for name, right in checks.items() if not right), None)
    if wrong is not None:
        raise WrongBundleError(
            f"{file.path}: {wrong}: expected that of a server state, found {str(header.get(wrong))[:80]!r}; "
            "take a state that aggregate wrote"
        )
    return ServerState(
        fingerprint=header["fingerprint"],
        round=header["round"],
        base=header["base"],
        algorithm=str(name),
        options=dict(options or {}),
        history=history,
    )
