"""The tensors with which a model begins: shared ones from a weights file, personal ones of the device itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from device_runtime.engines.protocol import Engine
from device_runtime.state import DeviceState, Groups
from fedpara_edge.algorithms import ClientAlgorithm
from fedpara_edge.errors import InputError, WrongBundleError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.serverstate import Group, read_server_state
from fedpara_edge.formats.weights import Weights, read_weights


def load_weights(engine: Engine, path: Path, *, state: Path | None = None) -> Weights:
    """Load the shared tensors of a weights file, and if asked for a device's personal tensors, into an engine.

    Args:
        engine: Engine, newly opened.
        path: Weights file.
        state: State folder with the personal tensors after the last finished call; None for the initial ones. It is
            only read, so a training may use it at the same time.

    Returns:
        Content of the weights file.

    Raises:
        InputError: The weights or the state folder is missing, or the state is damaged.
        WrongBundleError: The weights are damaged, hold NaN or Inf, or belong to another bundle; or the state does.
    """
    weights = read_weights(path, engine.bundle)
    engine.load(weights.tensors)
    if state is not None:
        engine.load(read_personal(engine.bundle, state))
    return weights


def read_personal(bundle: Bundle, state: Path) -> dict[str, NDArray[Any]]:
    """Personal tensors of a device after its last finished call, by name; none before the first.

    Args:
        bundle: Bundle that the device trains.
        state: State folder of the device, which is only read, so a training may use it at the same time.

    Raises:
        InputError: There is no folder at `state`, or it is damaged.
        WrongBundleError: The state belongs to another bundle.
    """
    if not state.is_dir():
        raise InputError(f"{state}: expected a state folder, found none; train with --state {state} first")
    committed = DeviceState(state, bundle.manifest.fingerprint).committed()
    names = [tensor.name for tensor in bundle.manifest.layout.with_role("personal")]
    return {} if committed is None else {name: committed.after["personal"][name] for name in names}


def read_control(path: Path | None, weights: Weights, algorithm: ClientAlgorithm) -> Group:
    """Control variate of the server for some weights, by name; empty for zeros.

    Args:
        path: Server state file; None if there is none.
        weights: Weights from which the training starts.
        algorithm: Client's half of the algorithm, which may need a control variate.

    Raises:
        InputError: The algorithm takes no control variate, or needs one and there is none.
        WrongBundleError: The file is damaged, belongs with other weights, or has no control variate.
    """
    if path is None:
        if algorithm.controlled and weights.round:
            raise InputError(
                f"algorithm {algorithm.name}: expected the server's control variate of round {weights.round}, found "
                "none; pass the server state of that round with --server-state"
            )
        return {}
    if not algorithm.controlled:
        raise InputError(
            f"{path}: expected a control variate with algorithm scaffold, found {algorithm.name}; leave it out"
        )
    state = read_server_state(path, only=("control",))
    try:
        state.check_weights(weights)
    except WrongBundleError as error:
        raise WrongBundleError(f"{path}: {error}") from error
    if "control" not in state.groups:
        raise WrongBundleError(
            f"{path}: expected the server state of algorithm scaffold, found that of {state.algorithm}; "
            "train with the server's algorithm"
        )
    return state.groups["control"]


def load_personal(engine: Engine, groups: Groups) -> dict[str, NDArray[Any]]:
    """Load the personal tensors of a device into a new engine, and return them by name.

    Args:
        engine: Engine, newly opened.
        groups: Groups of tensors that the device keeps (`state`); without the group `personal`, the personal tensors
            are the initial ones of the engine.
    """
    kept = groups.get("personal") or engine.read()
    personal = {tensor.name: kept[tensor.name] for tensor in engine.bundle.manifest.layout.with_role("personal")}
    engine.load(personal)
    return personal
