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
    of_state = "  [default: repository in --state]"
    return _options(function, "bundle and weights from, in place of BUNDLE and --weights", of_state)


def model_repository_options(function: Function) -> Function:
    """The options `--repository`, `--root` and `--cache`; `find_model` takes them."""
    return _options(function, "the folded model from, in place of MODEL", "")


def _options(function: Function, what: str, default: str) -> Function:
    cache = click.option("--cache", type=PATH, help=f"Folder for what was verified; with --repository.{default}")
    root = click.option("--root", type=PATH, help="Root metadata that this device trusts; with --repository.")
    repository = click.option("--repository", metavar="DIR|URL", help=f"Signed repository of `publish` to take {what}.")
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
    if repository is not None and weights is not None:
        raise InputError("expected the weights of --repository alone, found others; leave it out", key="weights")
    if cache is None and state is not None and repository is not None:
        cache = state / "repository"
    place = _find_place("BUNDLE", bundle, repository, root, cache, remedy="give it, or --state")
    if isinstance(place, Path):
        return Origin(place, weights, None)
    from fedpara_edge.trust.client import receive

    received = receive(*place)
    return Origin(received.bundle, received.weights, received.run)


def find_model(model: Path | None, *, repository: str | None, root: Path | None, cache: Path | None) -> Path:
    """The folded model that was given, or that of a repository, verified.

    Raises:
        InputError: Options don't go together.
        TrustError: What is in the repository is not to be trusted.
    """
    place = _find_place("MODEL", model, repository, root, cache, remedy="give it")
    if isinstance(place, Path):
        return place
    from fedpara_edge.trust.client import receive_model

    return receive_model(*place)


def _find_place(
    name: str, given: Path | None, repository: str | None, root: Path | None, cache: Path | None, *, remedy: str
) -> Path | tuple[str, Path, Path]:
    """The argument of that name, or repository, root and cache where these are given in its place."""
    if repository is None:
        for key, value in (("root", root), ("cache", cache)):
            if value is not None:
                raise InputError("expected with --repository, found without; leave it out", key=key)
        if given is None:
            raise click.UsageError(f"expected {name} or --repository, found neither")
        return given
    if given is not None:
        raise click.UsageError(f"expected {name} or --repository, found both; leave {given} out")
    if root is None:
        raise InputError("expected the root metadata that this device trusts, found none; give them", key="root")
    if cache is None:
        raise InputError(f"expected a folder for what was verified, found none; {remedy}", key="cache")
    from fedpara_edge.cli.installed import require

    require("trust")
    return repository, root, cache


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
    return find_seals(key)(str(run or origin.run))


def find_seals(key: Path) -> Callable[[str], Ready]:
    """The function of a run that gives the function which signs updates for it with a private key.

    Raises:
        InputError: The key can't be read.
    """
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.envelope import write_envelope
    from fedpara_edge.trust.keys import read_signer

    signer = read_signer(key)
    return lambda run: lambda update, output: write_envelope(update, output, signer, run)
