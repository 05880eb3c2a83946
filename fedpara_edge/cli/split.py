"""`fedpara-edge split`: one data file to a file for each client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.output import emit, force_option, json_option

FOLDER_OR_FILE = click.Path(path_type=Path)


def _pair(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    names = text.split(",")
    if len(names) != 2 or not all(names):
        raise click.BadParameter(f"expected two names of arrays such as x,y, found {text!r}", ctx, parameter)
    return names[0], names[1]


@click.command("split")
@click.argument("data", type=FOLDER_OR_FILE)
@click.option("-o", "--output", type=FOLDER_OR_FILE, required=True, help="Folder to write.")
@click.option(
    "--by",
    type=click.Choice(["iid", "dirichlet", "shards", "key"]),
    default="iid",
    show_default=True,
    help="How rows are dealt: evenly, classes unevenly, sorted by class in pieces, or each to its owner.",
)
@click.option("--clients", type=int, help="How many, for iid, dirichlet and shards.")
@click.option("--alpha", type=float, help="For dirichlet: the smaller, the fewer classes a client has.")
@click.option("--shards", type=int, help="For shards: pieces of each client.")
@click.option("--key", metavar="ARRAY", help="For key: the array with the owner of each row.")
@click.option("--least", type=int, default=1, show_default=True, help="Fewest training examples of a client.")
@click.option("--test-share", type=float, default=0.0, show_default=True, help="Part of each client's rows held out.")
@click.option("--group", metavar="ARRAY", help="Rows of equal value there are held out or trained on together.")
@click.option("--train", callback=_pair, default="x,y", show_default=True, help="Arrays with inputs and labels.")
@click.option("--test", callback=_pair, metavar="X,Y", help="Arrays with a common test set.")
@click.option("--max-clients", type=int, help="Keep so many clients, drawn at random.")
@click.option("--max-examples", type=int, help="Keep so many rows of each client, drawn at random.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@force_option
@json_option
def command(
    data: Path,
    output: Path,
    by: Any,
    clients: int | None,
    alpha: float | None,
    shards: int | None,
    key: str | None,
    least: int,
    test_share: float,
    group: str | None,
    train: Any,
    test: Any,
    max_clients: int | None,
    max_examples: int | None,
    seed: int,
    force: bool,
    json: bool,
) -> None:
    """Deal the rows of DATA to clients, as `simulate` does, and write what `train` and `evaluate` take.

    OUTPUT gets train/CLIENT.npz, test/CLIENT.npz of what each holds out, and test.npz of the common test set.
    """
    from fedpara_edge.simulation.data.federation import DataPlan, load_federation, write_federation
    from fedpara_edge.storage.atomic import check_output

    check_output(output, overwrite=force, folder=True)
    plan = DataPlan(
        path=data,
        split=by,
        clients=clients,
        alpha=alpha,
        shards=shards,
        key=key,
        least=least,
        test_share=test_share,
        group=group,
        train=train,
        test=test,
        max_clients=max_clients,
        max_examples=max_examples,
    )
    federation = load_federation(plan, seed)
    write_federation(federation, output, overwrite=force)
    sizes = [len(client.train) for client in federation.clients]
    held = sum(len(client.test) for client in federation.clients if client.test is not None)
    result = {
        "folder": str(output),
        "clients": {
            client.name: {"train": len(client.train), "test": len(client.test) if client.test else 0}
            for client in federation.clients
        },
        "test": len(federation.test) if federation.test else 0,
        "left_out": list(federation.left_out),
    }
    lines = [
        f"{output}: {len(sizes)} clients with {min(sizes)} to {max(sizes)} examples to train on, {sum(sizes)} in all"
    ]
    if held:
        lines.append(f"{held} held out by them")
    if federation.test is not None:
        lines.append(f"{len(federation.test)} in the common test set")
    if federation.left_out:
        lines.append(f"{len(federation.left_out)} left out with fewer than {least}")
    emit(result, "\n".join(lines), as_json=json)
