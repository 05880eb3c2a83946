"""`fedpara-edge push`: a bundle or weights to a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, json_option, note
from fedpara_edge.errors import counted


@click.command("push", cls=Command)
@click.argument("path", type=PATH)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Let nobody else see a repository that is made.")
@json_option
def command(path: Path, repository: str, private: bool, json: bool) -> None:
    """Push PATH, a bundle or weights of it, to a repository of the Hugging Face Hub.

    A bundle gets a model card made from its manifest; a card of somebody else's stays. Weights become
    weights/round-N.safetensors, beside their bundle. The token is that of `hf auth login` or HF_TOKEN, and HF_ENDPOINT
    names another server.
    """
    from fedpara_edge.cli.installed import require

    require("hub")
    from fedpara_edge.hub.repository import push

    done = push(path, repository, private=private)
    if done.kept_card:
        note(f"{repository}: has a model card of its own, which stays")
    result = {"path": path, "repository": repository, "commit": done.address, "files": list(done.files)}
    emit(result, f"{repository}: {counted(len(done.files), 'file')} of {path}; {done.address}", as_json=json)
