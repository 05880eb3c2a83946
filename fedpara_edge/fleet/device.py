"""A device's part: what came with a call is kept, the weights are brought up to date, and `train` does the rest.

Beside what `train` keeps in the state folder (`device_runtime.state`) a device of a fleet keeps there

    fleet/bundle/                the bundle that the server sent
    fleet/weights.safetensors    the weights that it has
    fleet/update.safetensors     its last update

so that it needs nothing but its data, goes on after any interruption, and gets changes in place of whole weights.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from device_runtime.config import TrainCall
from device_runtime.data import open_data
from device_runtime.engines.registry import open_engine
from device_runtime.result import TrainResult
from device_runtime.training import train
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.fleet.settings import NodeConfig
from fedpara_edge.formats.bundle import WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.options import bind
from fedpara_edge.storage.atomic import Ready, replacing_file, replacing_folder

if TYPE_CHECKING:
    from fedpara_edge.fleet.messages import Answer, Call

FLEET = "fleet"
"""Folder in the state folder for what the fleet needs."""
UPDATE = "update.safetensors"
IN_BUNDLE = "bundle/"
"""Beginning of the names under which the files of a bundle travel."""


def answer(call: Call, node: NodeConfig) -> Answer:
    """Train as a call asks, and answer it; a refusal is an answer too.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM arrived; the progress is saved.
    """
    from fedpara_edge.fleet.messages import Answer

    try:
        node.state.mkdir(parents=True, exist_ok=True)
        folder = node.state / FLEET
        folder.mkdir(exist_ok=True)
        bundle = _bundle(call, node, folder)
        if bundle is None:
            return Answer(lacks="bundle weights")
        weights = _weights(call, bundle, folder)
        if (weights.round, weights.base) != (call.round, call.base):
            return Answer(lacks="weights")
        result = _train(call, node, bundle, folder)
    except FedparaError as error:
        return Answer(code=error.code, message=str(error))
    except OSError as error:
        return Answer(code=FedparaError.code, message=f"{node.state}: {error.strerror or error}")
    numbers = {
        "examples": result.examples,
        "steps": result.steps,
        "resumed_from_step": result.resumed_from_step,
        "seconds": result.seconds,
        "loss": result.losses[-1],
    }
    files = {"update": folder / UPDATE, "signature": folder / f"{UPDATE}.dsse"}
    sent = {name: path.read_bytes() for name, path in files.items() if name == "update" or node.key is not None}
    return Answer(numbers=numbers, files=sent)


def _bundle(call: Call, node: NodeConfig, folder: Path) -> Bundle | None:
    """The bundle of a call; None if the device has none yet.

    Raises:
        WrongBundleError: The device was given another.
    """
    if node.bundle is not None:
        bundle = open_bundle(node.bundle)
        if bundle.manifest.fingerprint != call.fingerprint:
            raise WrongBundleError(
                f"{node.bundle}: expected the bundle of the fleet ({call.fingerprint[:12]}), found another "
                f"({bundle.manifest.fingerprint[:12]}); copy that one here, or leave bundle out of --node-config"
            )
        return bundle
    own = folder / "bundle"
    if own.is_dir() and (bundle := open_bundle(own)).manifest.fingerprint == call.fingerprint:
        return bundle
    sent = {name.removeprefix(IN_BUNDLE): each for name, each in call.files.items() if name.startswith(IN_BUNDLE)}
    if not sent:
        return None
    with replacing_folder(own) as made:
        for name, content in sent.items():
            if Path(name).name != name:
                raise InputError(f"bundle: expected names of files, found {name!r}; update the server")
            (made / name).write_bytes(content)
        if open_bundle(made).manifest.fingerprint != call.fingerprint:
            raise WrongBundleError(f"bundle: expected that of the call ({call.fingerprint[:12]}), found another")
    return open_bundle(own)


def _weights(call: Call, bundle: Bundle, folder: Path) -> Weights:
    """The weights that the device has, with all that came with a call.

    Raises:
        FedparaError: A file is damaged, or belongs to another bundle.
    """
    path = folder / WEIGHTS
    if (whole := call.files.get("weights")) is not None:
        with replacing_file(path) as temporary:
            temporary.write_bytes(whole)
            read_weights(temporary, bundle)
        return read_weights(path, bundle)
    current = None
    if call.round and path.exists():
        with suppress(FedparaError):  # of another bundle, or damaged: it begins from the initial ones
            current = read_weights(path, bundle)
    if current is None:
        current = read_weights(bundle.file(WEIGHTS), bundle)
    while (change := call.files.get(f"change-{current.round + 1}")) is not None:
        with replacing_file(folder / "change.safetensors") as temporary:
            temporary.write_bytes(change)
            current = apply_change(current, temporary)
    write_weights(path, current, overwrite=True)
    return current


def _train(call: Call, node: NodeConfig, bundle: Bundle, folder: Path) -> TrainResult:
    options = {**call.options, **{name: value for name in ("engine", "threads") if (value := getattr(node, name))}}
    config = bind(TrainCall, options)
    control = None
    if (content := call.files.get("control")) is not None:
        control = folder / "control.safetensors"
        with replacing_file(control) as temporary:
            temporary.write_bytes(content)
    return train(
        open_engine(bundle, config.engine, threads=config.threads),
        open_data(node.data, bundle.manifest, node.reading),
        folder / WEIGHTS,
        config,
        output=folder / UPDATE,
        encoder=config.encoder,
        privacy=config.mechanism,
        state=node.state,
        client=node.client,
        server_state=control,
        seal=_seal(node, call.run),
        overwrite=True,
    )


def _seal(node: NodeConfig, run: str) -> Ready | None:
    """The function that signs an update; None for a device without a key."""
    if node.key is None:
        return None
    if not run:
        raise InputError("key: expected with a fleet that has a list of clients (--allow), found without; leave it out")
    from fedpara_edge.trust.envelope import write_envelope
    from fedpara_edge.trust.keys import read_signer

    signer = read_signer(node.key)
    return lambda update, output: write_envelope(update, output, signer, run)
