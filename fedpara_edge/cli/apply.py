"""`fedpara-edge apply`: weights and the changes since to the newest weights."""

from __future__ import annotations

from pathlib import Path

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, megabytes, output_options
from fedpara_edge.errors import counted


@click.command("apply", cls=Command)
@click.argument("weights", type=PATH)
@click.argument("changes", nargs=-1, required=True, type=PATH, metavar="CHANGE...")
@click.option("-o", "--output", type=PATH, required=True, help="Weights file to write.")
@output_options
def command(weights: Path, changes: tuple[Path, ...], output: Path, overwrite: bool, json: bool) -> None:
    """Apply each CHANGE that the server published to WEIGHTS, in the order of their rounds.

    The result is the server's own, bit for bit, or nothing is written: a change that was altered ends with exit code 3,
    one for other weights with 6.
    """
    from fedpara_edge.formats.change import apply_change
    from fedpara_edge.formats.weights import read_weights, write_weights
    from fedpara_edge.storage.atomic import check_output

    check_output(output, overwrite=True, inputs=(weights, *changes))
    current = read_weights(weights)
    first, received = current.round, 0
    for change in changes:
        current = apply_change(current, change)
        received += change.stat().st_size
    write_weights(output, current, overwrite=overwrite)
    whole = output.stat().st_size
    dense = 4 * current.layout.dense_parameters
    text = (
        f"{output}: round {current.round}, from round {first} by {counted(len(changes), 'change')}\n"
        f"received {megabytes(received)}; the weights themselves are {megabytes(whole)}, the dense model's "
        f"{megabytes(dense)}"
    )
    result = {
        "output": output,
        "round": current.round,
        "from_round": first,
        "changes": len(changes),
        "received_bytes": received,
        "weights_bytes": whole,
        "dense_bytes": dense,
    }
    emit(result, text, as_json=json)
