"""Options of commands that take a bundle and weights from a signed repository in place of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fedpara_edge.cli.options import PATH
from fedpara_edge.errors import InputError

if TYPE_CHECKING:
    from fedpara_edge.storage.atomic import Ready

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Origin:
    """What a device is to run.

    Args:
        bundle: Bundle folder.
        weights: Weights file; None for those of the bundle.
        run: Name of the run that the repository states; None without one.
    """

    bundle: Path
    weights: Path | None
    run: str | None


def repository_options(function: Function) -> Function:
    """The options `--repository`, `--root` and `--cache`; `find_origin` takes them."""
    cache = click.option("--cache", type=PATH, help="Folder for what was verified.  [default: repository in --state]")
    root = click.option("--root", type=PATH, help="Root metadata that this device trusts; with --repository.")
    repository = click.option(
        "--repository",
        metavar="DIR|URL",
        help="Signed repository of `publish` to take bundle and weights from, in place of BUNDLE and --weights.",
    )
    return repository(root(cache(function)))


def find_origin(
    bundle: Path | None,
    weights: Path | None,
    *,
    repository: str | None,
    root: Path | None,
    cache: Path | None,
    state: Path | None,
) -> Origin:
    """The bundle and the weights that were given, or those of a repository, verified.

    Raises:
        InputError: Options don't go together.
        TrustError: What is in the repository is not to be trusted.
    """
    if repository is None:
        for key, value in (("root", root), ("cache", cache)):
            if value is not None:
                raise InputError("expected with --repository, found without; leave it out", key=key)
        if bundle is None:
            raise click.UsageError("expected BUNDLE or --repository, found neither")
        return Origin(bundle, weights, None)
    if bundle is not None:
        raise click.UsageError(f"expected BUNDLE or --repository, found both; leave {bundle} out")
    if weights is not None:
        raise InputError("expected the weights of --repository alone, found others; leave it out", key="weights")
    if root is None:
        raise InputError("expected the root metadata that this device trusts, found none; give them", key="root")
    if cache is None and state is None:
        raise InputError("expected a folder for what was verified, found none; give it, or --state", key="cache")
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.client import receive

    received = receive(repository, root, cache or Path(str(state)) / "repository")
    return Origin(received.bundle, received.weights, received.run)


def find_seal(key: Path | None, run: str | None, origin: Origin) -> Ready | None:
    """The function that signs an update with a private key for the run; None without a key.

    Raises:
        InputError: The key can't be read, or the run is not known or another than the repository's.
    """
    if key is None:
        if run is not None:
            raise InputError("expected with --key, found without; leave it out", key="run")
        return None
    if run is None and not origin.run:
        raise InputError("expected the name of the run with --key, found none; give it", key="run")
    if run is not None and origin.run is not None and run != origin.run:
        raise InputError(f"expected {origin.run!r}, the repository's, found {run!r}; leave it out", key="run")
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.envelope import write_envelope
    from fedpara_edge.trust.keys import read_signer

    signer, name = read_signer(key), str(run or origin.run)
    return lambda update, output: write_envelope(update, output, signer, name)
