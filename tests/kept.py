"""A state folder as a finished call leaves it, without the call."""

from device_runtime.state import DeviceState
from device_runtime.statefiles import Committed
from fedpara_edge.formats.update import FORMAT, EncodedUpdate


def commit(state: DeviceState, committed: Committed) -> None:
    """Commit what a call left behind, with an update of nothing."""
    update = EncodedUpdate(header={"format": FORMAT, "version": 1}, arrays={}, change={})
    state.commit(committed, update, state.folder.with_name(f"{state.folder.name}.update"))
