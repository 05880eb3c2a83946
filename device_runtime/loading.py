"""The tensors with which a model begins: shared ones from a weights file, personal ones of the device itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from device_runtime.engines.protocol import Engine
from device_runtime.state import COMMITTED, DeviceState
from device_runtime.statefiles import Groups
from fedpara_edge.algorithms import ClientAlgorithm
from fedpara_edge.errors import InputError, WrongBundleError, brief
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.serverstate import Group, read_server_state
from fedpara_edge.formats.weights import Weights, read_weights

PERSONAL, RESIDUAL = "personal", "residual"
"""Groups of a state folder."""


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
    engine.load(weights.whole)
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
    if committed is None:
        return {}
    _check_groups(committed.after, bundle.manifest.layout, state)
    return dict(committed.after.get(PERSONAL, {}))


def read_groups(state: DeviceState, call: Mapping[str, Any], bundle: Bundle) -> Groups:
    """Groups with which a call begins, each of tensors of the bundle; none before the first call.

    Raises:
        InputError: The committed state is damaged, or has tensors that the bundle lacks, or lacks some.
        WrongBundleError: The state belongs to another bundle.
    """
    groups = state.groups_for(call)
    if groups:
        _check_groups(groups, bundle.manifest.layout, state.folder)
    return groups


def _check_groups(groups: Groups, layout: Layout, folder: Path) -> None:
    """Compare the tensors of each group with those of the layout: personal, shared, or shared and trained."""
    personal, shared = layout.with_role("personal"), layout.shared
    trained = tuple(tensor for tensor in shared if tensor in layout.trained)
    for group, tensors in {PERSONAL: {}, **groups}.items():
        expected = {PERSONAL: personal, RESIDUAL: shared}.get(group, trained)
        wanted = {tensor.name: ("float32", tensor.shape) for tensor in expected}
        found = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise InputError(
                f"{folder}: tensor {brief(f'{group}/{name}')}: expected {_spelled(wanted.get(name))}, found "
                f"{_spelled(found.get(name))}; delete {COMMITTED} in it to begin from the bundle's initial personal "
                "tensors"
            )


def _spelled(dtype_and_shape: tuple[str, tuple[int, ...]] | None) -> str:
    return "none" if dtype_and_shape is None else f"{dtype_and_shape[0]} {list(dtype_and_shape[1])}"


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
