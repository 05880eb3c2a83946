"""`fedpara-edge train`: local epochs on one device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from device_runtime.config import TrainCall
from device_runtime.sources import Reading
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.log import event
from fedpara_edge.cli.options import DATA, PATH, options_of
from fedpara_edge.cli.output import emit, megabytes, note, output_options
from fedpara_edge.cli.received import find_origin, find_seal, repository_options
from fedpara_edge.cli.streams import drawing
from fedpara_edge.errors import counted

if TYPE_CHECKING:
    from device_runtime import Choice

RENAMED = {
    "--control": "--server-state",
    "--mu": "--algorithm fedprox:mu=…",
    "--alpha": "--algorithm feddyn:alpha=…",
}


@click.command("train", cls=Command, renamed=RENAMED)
@click.argument("bundle", type=PATH, required=False)
@repository_options
@click.option("--data", type=PATH, required=True, help=DATA)
@click.option("--weights", type=PATH, help="Weights to start from.  [default: the bundle's]")
@click.option("-o", "--output", type=PATH, required=True, help="Update file to write.")
@click.option("--state", type=PATH, help="The device's state folder: personal tensors, and what a resume needs.")
@options_of(TrainCall)
@options_of(Reading, into="reading")
@click.option("--server-state", type=PATH, help="Server state of the weights' round; scaffold needs it after round 0.")
@click.option("--client", help="Name of this device in the update.  [default: kept in the state folder, or random]")
@click.option("--key", type=PATH, metavar="FILE", help="Private key of this device, to sign the update with.")
@click.option("--run", help="Name of the run that the update is signed for.  [default: the repository's]")
@output_options
def command(
    bundle: Path | None,
    repository: str | None,
    root: Path | None,
    cache: Path | None,
    data: Path,
    weights: Path | None,
    output: Path,
    state: Path | None,
    server_state: Path | None,
    client: str | None,
    key: Path | None,
    run: str | None,
    options: Mapping[str, Any],
    reading: Mapping[str, Any],
    overwrite: bool,
    json: bool,
) -> None:
    """Train BUNDLE on local data for some epochs and write the change of the shared tensors.

    Interrupted with Ctrl-C, or by a power cut, the same command with the same --state goes on where it stopped, to the
    very same update.
    """
    from fedpara_edge.cli.installed import require

    require("device")
    from device_runtime import open_data, open_tuned, progress_bar, train
    from fedpara_edge.formats.bundle import WEIGHTS, open_bundle

    call = TrainCall(**options)
    if state is None and not call.encoder.unbiased:
        note(f"note: without --state, what the codec {call.codec} leaves out of this update is lost")
    origin = find_origin(bundle, weights, repository=repository, root=root, cache=cache, state=state)
    opened = open_bundle(origin.bundle)
    seal = find_seal(key, run, origin)
    dataset = open_data(data, opened.manifest, Reading(**reading))
    engine = open_tuned(opened, call, dataset, state, on_choice=_say)
    with progress_bar(drawing(sys.stderr)) as on_step:
        result = train(
            engine,
            dataset,
            origin.weights or opened.file(WEIGHTS),
            call,
            output=output,
            encoder=call.encoder,
            privacy=call.mechanism,
            state=state,
            client=client,
            server_state=server_state,
            seal=seal,
            overwrite=overwrite,
            on_step=on_step,
        )
    event("training_finished", update=output, **result.log_fields)
    resumed = f", resumed at step {result.resumed_from_step}" if result.resumed_from_step else ""
    losses = [f"{loss:.4f}" for loss in dict.fromkeys((result.losses[0], result.losses[-1]))]
    dense = 4 * opened.manifest.layout.dense_parameters
    text = (
        f"{output}: {counted(result.examples, 'example')}, {counted(result.steps, 'step')} in {result.seconds:.1f} "
        f"s{resumed}, "
        f"loss {' -> '.join(losses)}\n"
        f"sends {megabytes(result.update_bytes)}, {result.update_bytes / dense:.1%} of the dense model's "
        f"{megabytes(dense)}"
    )
    if call.mechanism is not None and result.spent is not None:
        text += f"\nprivacy: ε {result.spent:.4g} of {call.mechanism.epsilon:g} spent at δ {call.mechanism.delta:g}"
    emit({"update": output, **asdict(result), "dense_bytes": dense}, text, as_json=json)


def _say(choice: Choice) -> None:
    event("tuned", **choice.log_fields)
    note(str(choice))
