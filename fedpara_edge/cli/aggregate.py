"""`fedpara-edge aggregate`: updates to the next weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedpara_edge.cli.output import emit, force_option, json_option, megabytes, note
from fedpara_edge.errors import FedparaError, TooFewUpdatesError

if TYPE_CHECKING:
    from fedpara_edge.aggregation import Round

FOLDER_OR_FILE = click.Path(path_type=Path)
ALGORITHMS = "fedavg, fedavgm, fedadam, fedyogi, fedadagrad, scaffold or feddyn."


@click.command("aggregate")
@click.argument("updates", nargs=-1, type=FOLDER_OR_FILE)
@click.option("--weights", type=FOLDER_OR_FILE, required=True, help="Weights the updates started from.")
@click.option("-o", "--output", type=FOLDER_OR_FILE, required=True, help="Next weights to write.")
@click.option("--algorithm", default="fedavg", show_default=True, help=ALGORITHMS, metavar="NAME")
@click.option("--server-lr", type=float, help="Learning rate of the server.  [default: the algorithm's]")
@click.option("--momentum", type=float, help="Of fedavgm.  [default: 0.9]")
@click.option("--beta1", type=float, help="Of fedadam, fedyogi (0.9) and fedadagrad (0).")
@click.option("--beta2", type=float, help="Of fedadam and fedyogi.  [default: 0.99]")
@click.option("--tau", type=float, help="Of fedadam, fedyogi and fedadagrad.  [default: 0.001]")
@click.option("--alpha", type=float, help="Strength of feddyn, the same as the devices'.  [default: 0.1]")
@click.option("--clients", type=int, help="Number of all clients; scaffold and feddyn need it.")
@click.option(
    "--weighting",
    type=click.Choice(["examples", "equal"]),
    help="Of the updates.  [default: equal for scaffold and feddyn, else by examples]",
)
@click.option(
    "--merge",
    type=click.Choice(["mean", "refit"]),
    default="mean",
    show_default=True,
    help="Of the factors; refit brings them closer to the mean of the weights they compose to.",
)
@click.option(
    "--state", type=FOLDER_OR_FILE, help="The server's state folder: what the algorithm or the downlink keeps."
)
@click.option("--downlink-codec", help="Send the weights as a change through this codec; needs --change and --state.")
@click.option("--change", type=FOLDER_OR_FILE, help="Change file to write.")
@click.option(
    "--min-updates", type=click.IntRange(min=1), default=1, show_default=True, help="Fewer valid ones: exit code 4."
)
@click.option("--strict", is_flag=True, help="Stop at the first bad update, with its exit code.")
@force_option
@json_option
def command(
    updates: tuple[Path, ...],
    weights: Path,
    output: Path,
    algorithm: str,
    server_lr: float | None,
    momentum: float | None,
    beta1: float | None,
    beta2: float | None,
    tau: float | None,
    alpha: float | None,
    clients: int | None,
    weighting: Any,
    merge: Any,
    state: Path | None,
    downlink_codec: str | None,
    change: Path | None,
    min_updates: int,
    strict: bool,
    force: bool,
    json: bool,
) -> None:
    """Average UPDATES and write the next weights, by the algorithm given.

    The order of UPDATES does not change a bit of the result. A bad update is refused and named and does not stop the
    others. The state folder gets one file for each round, whose name is the round's: that of --weights must be there,
    except at round 0. With a downlink codec the weights written are those that devices get by applying the change.
    """
    from fedpara_edge.aggregation import AggregateConfig, run_round

    config = AggregateConfig(
        algorithm=algorithm,
        lr=server_lr,
        momentum=momentum,
        beta1=beta1,
        beta2=beta2,
        tau=tau,
        alpha=alpha,
        clients=clients,
        weighting=weighting,
        merge=merge,
        min_updates=min_updates,
        strict=strict,
        downlink_codec=downlink_codec,
    )
    try:
        with _progress_bar(len(updates)) as on_progress:
            done = run_round(
                updates,
                weights,
                output,
                config,
                state=state,
                change=change,
                overwrite=force,
                on_progress=on_progress,
            )
    except TooFewUpdatesError as error:
        _show(error.rejected)
        raise
    _show([update.error for update in done.aggregation.rejected])
    emit(done.to_json(), _text(done), as_json=json)


def _text(done: Round) -> str:
    result = done.aggregation
    text = (
        f"{done.output}: round {done.number} from {len(result.accepted)} updates "
        f"({sum(update.examples for update in result.accepted)} examples), {len(result.rejected)} rejected\n"
        f"received {megabytes(result.received_bytes)}, {result.share:.1%} of the {megabytes(result.dense_bytes)} "
        "that the dense model costs in float32"
    )
    if result.rejected_bytes:
        text += f", and {megabytes(result.rejected_bytes)} that were rejected"
    if done.change_bytes is not None:
        text += f"\n{done.change}: {megabytes(done.change_bytes)} to each device"
    if result.gap is not None:
        text += (
            f"\naggregation gap {result.gap.relative:.2%} of the mean change "
            f"({result.gap.entries} composed weights of {len(result.gap.layers)} layers compared)"
        )
    if result.refit is not None:
        text += f"\nrefitted: {result.refit.before:.2%} -> {result.refit.after:.2%} of it"
    return text


def _show(rejected: Iterable[FedparaError]) -> None:
    for error in rejected:
        note(f"rejected [{error.code}] {error}")


@contextmanager
def _progress_bar(files: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal."""
    with click.progressbar(length=files, label="reading", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield lambda done, _: bar.update(done - bar.pos)
