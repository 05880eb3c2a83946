"""`fedpara-edge publish`: a signed repository for devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, json_option
from fedpara_edge.errors import counted
from fedpara_edge.trust.publication import Additions, Lifetimes


@click.command("publish", cls=Command)
@click.argument("repository", type=PATH)
@click.option(
    "--root", type=PATH, required=True, help="Root metadata to trust, of `keys root`; a new version is added."
)
@click.option(
    "--bundle", type=PATH, help="Bundle to publish, in place of the one before and all that belonged with it."
)
@click.option("--run", help="Name of the run, to which updates are signed; with --bundle.")
@click.option("--weights", type=PATH, help="Newest weights, in place of those before.")
@click.option("--model", type=PATH, help="Folded model for `predict`, in place of the one before.")
@click.option("--change", type=PATH, multiple=True, help="Change that leads to newer weights, several times.")
@click.option("--transcript", type=PATH, multiple=True, help="Transcript of a round, several times.")
@click.option("--key", type=PATH, multiple=True, required=True, metavar="FILE", help="Private key, several times.")
@options_of(Lifetimes, into="lifetimes")
@json_option
def command(
    repository: Path,
    root: Path,
    bundle: Path | None,
    run: str | None,
    weights: Path | None,
    model: Path | None,
    change: tuple[Path, ...],
    transcript: tuple[Path, ...],
    key: tuple[Path, ...],
    lifetimes: Mapping[str, Any],
    json: bool,
) -> None:
    """Sign files for devices in REPOSITORY, a folder that any web server, share or USB stick can carry to them.

    It is a repository of The Update Framework. Without files, what is there is signed anew, so that it does not expire:
    with the key of the timestamp alone, or with others too.
    """
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.repository import publish

    additions = Additions(bundle=bundle, run=run, weights=weights, model=model, changes=change, transcripts=transcript)
    done = publish(repository, root, additions, key, Lifetimes(**lifetimes))
    versions = ", ".join(f"{role} {version}" for role, version in done.versions.items())
    text = f"{repository}: {counted(done.files, 'file')} of run {done.run}; {versions}; expires {done.expires}"
    emit({"repository": repository, **asdict(done)}, text, as_json=json)
