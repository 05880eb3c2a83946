"""A training call as the state folder knows it: its identity, where it begins, and its steps with saved progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from device_runtime.config import TrainConfig
from device_runtime.data import Dataset
from device_runtime.engines.protocol import Engine, Formed
from device_runtime.epochs import Step
from device_runtime.progress import OnStep
from device_runtime.state import PROGRESS, DeviceState
from device_runtime.statefiles import Progress
from fedpara_edge.codecs import spelled
from fedpara_edge.codecs.codec import Encoder
from fedpara_edge.errors import InputError, counted
from fedpara_edge.formats.weights import Weights
from fedpara_edge.privacy.local import LocalGaussian
from fedpara_edge.storage.atomic import check_output, sha256_of
from fedpara_edge.storage.wholefile import real_path


def identity_of(
    origin: Weights,
    dataset: Dataset,
    engine: Engine,
    encoder: Encoder,
    config: TrainConfig,
    privacy: LocalGaussian | None,
    server_state: Path | None,
) -> dict[str, Any]:
    """Identity of a call: everything that decides its outcome, as plain JSON data (`device_runtime.state`)."""
    return {
        "round": origin.round,
        "base": origin.base,
        "data": dataset.digest(),
        "engine": engine.name,
        **({"form": engine.form} if isinstance(engine, Formed) and engine.form != engine.forms[0] else {}),
        "codec": spelled(encoder),
        **({} if privacy is None else {"privacy": privacy.to_json()}),
        **({} if server_state is None else {"control": sha256_of(server_state)}),
        **config.decisive(),
    }


def begin(
    kept: DeviceState | None,
    call: Mapping[str, Any],
    *,
    steps: int,
    output: Path,
    inputs: Sequence[Path | None],
    overwrite: bool,
) -> Progress:
    """The progress with which a call begins: that of the same call, which was cut short, or none.

    Args:
        kept: Open state folder; None without one.
        call: Identity of the call.
        steps: Number of its steps.
        output: Update file that it writes.
        inputs: Files that it reads.
        overwrite: Whether `output` may exist.

    Raises:
        InputError: `output` is in the state folder, or one of the inputs.
        OutputExistsError: `output` exists, and is not this call's own.
    """
    place = str(output.absolute())
    if kept is not None and real_path(output).parent == real_path(kept.folder):
        raise InputError(f"{output}: expected a place outside the state folder, found one inside; choose another")
    found = None if kept is None else kept.progress()
    if found is not None and found.call == call:
        # With all steps taken, what is at `output` is this call's own update: only the commits after it are missing.
        is_own = found.step == steps and found.output == place
        check_output(output, overwrite=overwrite or is_own, inputs=inputs)
        return replace(found, output=place)
    check_output(output, overwrite=overwrite, inputs=inputs)
    committed = None if kept is None else kept.committed()
    if kept is not None and found is not None and committed is not None and found.call == committed.call:
        kept.remove_progress()  # the call had ended but for this
    elif kept is not None and found is not None:
        differing = sorted(key for key in call.keys() | found.call.keys() if call.get(key) != found.call.get(key))
        print(
            f"{kept.folder}: dropped the progress of another call (round {found.call['round']}, "
            f"{counted(found.step, 'step')}), "
            f"which differs in {', '.join(differing)}",
            file=sys.stderr,
        )
        kept.remove_progress()
    return Progress(call=call, output=place, step=0, seconds=0.0, loss_sums=(), groups={})


def resume(engine: Engine, begun: Progress, kept: DeviceState | None, *, steps: int, epochs: int) -> Progress:
    """The progress to begin with, whose groups are in the engine if there is any.

    Args:
        engine: Engine that is to go on.
        begun: Progress of the call (`begin`).
        kept: Open state folder; None without one.
        steps: Number of the call's steps.
        epochs: Number of its epochs.

    Raises:
        InputError: The progress does not belong to this call.
    """
    if begun.step and kept is not None:
        found, expected = begun.groups.get("engine", {}), engine.state()
        faults = {
            f"at most {counted(steps, 'step')}": begun.step > steps,
            "a sum of losses for each epoch": len(begun.loss_sums) != -(-begun.step * epochs // steps),
            f"tensors of engine {engine.name}": _arrays(found) != _arrays(expected),
        }
        if fault := next((text for text, is_so in faults.items() if is_so), None):
            raise InputError(
                f"{kept.folder}: expected the progress of this call with {fault}, found another; delete {PROGRESS} in "
                "it to begin the call again"
            )
        engine.restore(found)
    return replace(begun, groups={})


def _arrays(tensors: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    return {name: f"{tensors[name].dtype} {list(tensors[name].shape)}" for name in sorted(tensors)}


def save(kept: DeviceState | None, engine: Engine, progress: Progress) -> None:
    """Save the progress, with what the engine holds; nothing without a state folder."""
    if kept is not None:
        kept.save_progress(replace(progress, groups={"engine": engine.state()}))


def run(
    taken: Iterator[Step],
    begun: Progress,
    config: TrainConfig,
    *,
    steps: int,
    save: Callable[[Progress], None],
    interrupted: Callable[[], bool],
    on_step: OnStep | None,
) -> Progress:
    """Take the steps that are left, and save the progress when it is due; the progress after the last of them.

    Args:
        taken: The steps, each of which is taken when it is asked for.
        begun: Progress to begin with.
        config: Training configuration.
        steps: Number of the call's steps.
        save: Function that saves the progress.
        interrupted: Function that tells whether to stop.
        on_step: Function called after each step; None for none.

    Raises:
        KeyboardInterrupt: Interrupted before the last step; the progress is saved.
    """
    progress, sums = begun, list(begun.loss_sums)
    started = saved_at = time.monotonic()
    saved_step = begun.step
    for step in taken:
        if step.epoch == len(sums):
            sums.append(0.0)
        sums[step.epoch] += step.loss * step.examples
        now = time.monotonic()
        progress = replace(begun, step=step.number + 1, seconds=begun.seconds + now - started, loss_sums=tuple(sums))
        if on_step is not None:
            on_step(progress.step, steps, step.loss)
        if progress.step == steps:
            break
        stop = interrupted()
        if stop or config.is_save_due(seconds=now - saved_at, steps=progress.step - saved_step):
            save(progress)
            saved_at, saved_step = time.monotonic(), progress.step
        if stop:
            raise KeyboardInterrupt
    return progress
