"""`fedpara-edge aggregate`: updates to the next weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fedpara_edge.cli.output import emit, force_option, json_option, megabytes
from fedpara_edge.errors import FedparaError, TooFewUpdatesError


@click.command("aggregate")
@click.argument("updates", nargs=-1, type=click.Path(path_type=Path))
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="Weights the updates started from.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Next weights to write.")
@click.option(
    "--min-updates", type=click.IntRange(min=1), default=1, show_default=True, help="Fewer valid ones: exit code 4."
)
@click.option("--strict", is_flag=True, help="Stop at the first bad update, with its exit code.")
@force_option
@json_option
def command(
    updates: tuple[Path, ...], weights: Path, output: Path, min_updates: int, strict: bool, force: bool, json: bool
) -> None:
    """Average UPDATES by their numbers of examples and write the next weights.

    The order of UPDATES does not change a bit of the result. A bad update is refused and named and does not stop the
    others.
    """
    from fedpara_edge.aggregation import aggregate
    from fedpara_edge.files import check_output
    from fedpara_edge.weights import read_weights, write_weights

    check_output(output, overwrite=force)
    base = read_weights(weights)
    try:
        with _progress_bar(len(updates)) as on_progress:
            result = aggregate(updates, base, strict=strict, min_updates=min_updates, on_progress=on_progress)
    except TooFewUpdatesError as error:
        _show(error.rejected)
        raise
    _show([update.error for update in result.rejected])
    write_weights(output, result.weights)
    gap = result.gap
    text = (
        f"{output}: round {result.weights.round} from {len(result.accepted)} updates "
        f"({sum(update.examples for update in result.accepted)} examples), {len(result.rejected)} rejected\n"
        f"received {megabytes(result.received_bytes)}, {result.share:.1%} of the {megabytes(result.dense_bytes)} "
        "that the dense model costs in float32"
    )
    if result.rejected_bytes:
        text += f", and {megabytes(result.rejected_bytes)} that were rejected"
    if gap is not None:
        text += (
            f"\naggregation gap {gap.relative:.2%} of the mean change "
            f"({gap.entries} composed weights of {len(gap.layers)} layers compared)"
        )
    emit({"output": str(output), **result.to_json()}, text, as_json=json)


def _show(rejected: Iterable[FedparaError]) -> None:
    for error in rejected:
        click.echo(f"rejected [{error.code}] {error}", err=True)


@contextmanager
def _progress_bar(files: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal."""
    with click.progressbar(length=files, label="reading", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield lambda done, _: bar.update(done - bar.pos)
