"""`fedpara-edge keys`: key files, and root metadata that say which keys sign what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.command import Group
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, json_option, overwrite_option, table


@click.group("keys", cls=Group)
def command() -> None:
    """Make Ed25519 keys, and root metadata that say which of them sign what."""


@command.command("new")
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...")
@overwrite_option
@json_option
def new(files: tuple[Path, ...], overwrite: bool, json: bool) -> None:
    """Make a key pair for each FILE: the private key there, for its owner alone, and the public one in FILE.pub.

    Pairs that are there already stay where others are missing, so that the same command completes one that was cut
    short.
    """
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.keys import new_keys

    _show(new_keys(files, overwrite=overwrite), as_json=json)


@command.command("show")
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...")
@json_option
def show(files: tuple[Path, ...], json: bool) -> None:
    """Print the public key of each FILE, a private or a public one."""
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.keys import public_text, read_public

    _show({file: public_text(read_public(file)) for file in files}, as_json=json)


def _role(name: str, help: str) -> Callable[[Any], Any]:
    return click.option(f"--{name}-key", type=PATH, multiple=True, metavar="FILE", help=help)


@command.command("root")
@_role("root", "Key that signs root metadata, several times. A private key signs at once.")
@click.option("--threshold", type=click.IntRange(1), help="Root keys that must sign.  [default: as before, or 1]")
@_role("targets", "Key that signs the list of files, several times.")
@_role("snapshot", "Key that signs the list of metadata, several times.  [default: as before, or the timestamp's]")
@_role("timestamp", "Key that signs what is newest, several times.")
@click.option("--previous", type=PATH, help="Version before, whose keys stay where none are given.")
@click.option("--key", type=PATH, multiple=True, metavar="FILE", help="Further private key to sign with.")
@click.option("--days", type=click.IntRange(1, 36500), default=365, show_default=True, help="Days until it expires.")
@click.option("-o", "--output", type=PATH, required=True, help="Root metadata to write.")
@overwrite_option
@json_option
def root(
    root_key: tuple[Path, ...],
    threshold: int | None,
    targets_key: tuple[Path, ...],
    snapshot_key: tuple[Path, ...],
    timestamp_key: tuple[Path, ...],
    previous: Path | None,
    key: tuple[Path, ...],
    days: int,
    output: Path,
    overwrite: bool,
    json: bool,
) -> None:
    """Say which keys sign what, in root metadata that devices trust; or replace keys, in the next version of them.

    Keys are private or public files. Who holds a root key elsewhere signs with `keys sign`.
    """
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.roots import make_root, signatures

    given = {"root": root_key, "targets": targets_key, "snapshot": snapshot_key, "timestamp": timestamp_key}
    keys = {role: files for role, files in given.items() if files}
    metadata = make_root(
        output, keys, days=days, threshold=threshold, previous=previous, signers=key, overwrite=overwrite
    )
    _show_root(output, metadata.signed.version, signatures(metadata), as_json=json)


@command.command("sign")
@click.argument("root", type=PATH)
@click.option("--key", type=PATH, multiple=True, required=True, metavar="FILE", help="Private key to sign with.")
@json_option
def sign(root: Path, key: tuple[Path, ...], json: bool) -> None:
    """Add signatures to ROOT, root metadata made by `keys root`."""
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.roots import sign_root, signatures

    metadata = sign_root(root, key)
    _show_root(root, metadata.signed.version, signatures(metadata), as_json=json)


def _show(keys: dict[Path, str], *, as_json: bool) -> None:
    text = table(("file", "public key"), [(str(file), public) for file, public in keys.items()])
    emit({"keys": {str(file): public for file, public in keys.items()}}, text, as_json=as_json)


def _show_root(path: Path, version: int, signed: tuple[int, int], *, as_json: bool) -> None:
    found, needed = signed
    text = f"{path}: root version {version}, signed by {found} of its root keys, {needed} needed"
    emit({"root": path, "version": version, "signed": found, "needed": needed}, text, as_json=as_json)
