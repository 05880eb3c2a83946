"""`fedpara-edge train`: local epochs on one device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.output import emit, force_option, json_option, megabytes, note

FOLDER_OR_FILE = click.Path(path_type=Path)


@click.command("train")
@click.argument("bundle", type=FOLDER_OR_FILE)
@click.option("--data", type=FOLDER_OR_FILE, required=True, help=".npz with x and y, or a folder with x.npy and y.npy.")
@click.option("--weights", type=FOLDER_OR_FILE, help="Weights to start from.  [default: the bundle's]")
@click.option("-o", "--output", type=FOLDER_OR_FILE, required=True, help="Update file to write.")
@click.option(
    "--state", type=FOLDER_OR_FILE, help="The device's state folder: personal tensors, and what a resume needs."
)
@click.option("--epochs", type=int, default=1, show_default=True, help="Local epochs.")
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--lr", type=float, default=0.05, show_default=True, help="Learning rate.")
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine", "linear", "steps"]),
    default="constant",
    show_default=True,
    help="Of the learning rate within this call.",
)
@click.option("--drop-every", type=int, default=1, show_default=True, help="Epochs between drops of schedule steps.")
@click.option("--drop-factor", type=float, default=0.1, show_default=True, help="Of each drop of schedule steps.")
@click.option("--warmup-steps", type=int, default=0, show_default=True, help="Steps of linear warm-up.")
@click.option(
    "--lr-decay", type=float, default=1.0, show_default=True, help="Factor on the learning rate for each round."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of examples and of dropout.")
@click.option("--drop-last", is_flag=True, help="Leave out the last, smaller batch of an epoch.")
@click.option(
    "--clip-norm", type=float, help="Scale the gradient of a batch down to this norm.  [default: no clipping]"
)
@click.option(
    "--parts",
    type=int,
    default=1,
    show_default=True,
    help="Take the gradient of each batch in N parts, for less memory.",
    metavar="N",
)
@click.option(
    "--algorithm", default="fedavg", show_default=True, help="fedavg, fedprox, scaffold or feddyn.", metavar="NAME"
)
@click.option("--mu", type=float, help="Strength of fedprox.  [default: 0.1]")
@click.option("--alpha", type=float, help="Strength of feddyn, the same as the server's.  [default: 0.1]")
@click.option(
    "--control", type=FOLDER_OR_FILE, help="Server state of the weights' round; scaffold needs it after round 0."
)
@click.option("--client", help="Name of this device in the update.  [default: kept in the state folder, or random]")
@click.option("--engine", default="auto", show_default=True, help="onnxruntime, ort-training, or the faster there is.")
@click.option("--threads", type=int, help="Of the engine.  [default: as many as cores]")
@click.option(
    "--codec",
    default="float32",
    show_default=True,
    help="How the change is written, such as int8 or uniform:step=2; `fedpara-edge codec bench` compares them.",
)
@click.option(
    "--save-seconds",
    type=float,
    default=30.0,
    show_default=True,
    help="Time between two saves of the progress to --state.",
)
@click.option("--save-steps", type=int, help="Save after so many steps as well; 1 loses at most the current step.")
@force_option
@json_option
def command(
    bundle: Path,
    data: Path,
    weights: Path | None,
    output: Path,
    state: Path | None,
    epochs: int,
    batch_size: int,
    lr: float,
    schedule: Any,
    drop_every: int,
    drop_factor: float,
    warmup_steps: int,
    lr_decay: float,
    seed: int,
    drop_last: bool,
    clip_norm: float | None,
    parts: int,
    algorithm: str,
    mu: float | None,
    alpha: float | None,
    control: Path | None,
    client: str | None,
    engine: str,
    threads: int | None,
    codec: str,
    save_seconds: float,
    save_steps: int | None,
    force: bool,
    json: bool,
) -> None:
    """Train BUNDLE on local data for some epochs and write the change of the shared tensors.

    Interrupted with Ctrl-C, or by a power cut, the same command with the same --state goes on where it stopped, to the
    very same update.
    """
    from fedpara_edge.cli.installed import require

    require("device")
    from device_runtime import TrainConfig, open_data, open_engine, progress_bar, train
    from device_runtime.schedule import Schedule
    from fedpara_edge.algorithms import find_client
    from fedpara_edge.codecs import find_encoder
    from fedpara_edge.formats.bundle import WEIGHTS, open_bundle

    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        schedule=Schedule(
            shape=schedule,
            warmup_steps=warmup_steps,
            drop_every_epochs=drop_every,
            drop_factor=drop_factor,
            round_decay=lr_decay,
        ),
        seed=seed,
        drop_last=drop_last,
        clip_norm=clip_norm,
        parts=parts,
        algorithm=find_client(algorithm, {"mu": mu, "alpha": alpha}),
        checkpoint_seconds=save_seconds,
        checkpoint_steps=save_steps,
    )
    if state is None and not find_encoder(codec).unbiased:
        note(f"note: without --state, what the codec {codec} leaves out of this update is lost")
    opened = open_bundle(bundle)
    dataset = open_data(data, opened.manifest)
    with progress_bar() as on_step:
        result = train(
            opened,
            open_engine(opened, engine, threads=threads),
            dataset,
            weights or opened.file(WEIGHTS),
            config,
            output=output,
            state=state,
            client=client,
            codec=codec,
            server_state=control,
            overwrite=force,
            on_step=on_step,
        )
    resumed = f", resumed at step {result.resumed_from_step}" if result.resumed_from_step else ""
    losses = [f"{loss:.4f}" for loss in dict.fromkeys((result.losses[0], result.losses[-1]))]
    dense = 4 * opened.manifest.layout.dense_parameters
    text = (
        f"{output}: {result.examples} examples, {result.steps} steps in {result.seconds:.1f} s{resumed}, "
        f"loss {' -> '.join(losses)}\n"
        f"sends {megabytes(result.update_bytes)}, {result.update_bytes / dense:.1%} of the dense model's "
        f"{megabytes(dense)}"
    )
    emit({"update": str(output), **asdict(result), "dense_bytes": dense}, text, as_json=json)
