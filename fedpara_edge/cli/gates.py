"""Options by which a server takes signed updates and partials alone, and signs partials itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import Function, note
from fedpara_edge.errors import InputError

if TYPE_CHECKING:
    from fedpara_edge.aggregation.gate import Gate
    from fedpara_edge.privacy.ledger import PrivacyLedger
    from fedpara_edge.storage.atomic import Ready


def gate_options(function: Function) -> Function:
    """The options `--allow` and `--ledger`; `signature_gate` takes them."""
    ledger = click.option(
        "--ledger", type=PATH, help="Folder of what was accepted, with --allow.  [default: ledger in --state]"
    )
    return allow_option(ledger(function))


allow_option = click.option(
    "--allow",
    type=PATH,
    metavar="FILE",
    help="TOML file with keys of clients and aggregators: what they signed alone counts.",
)
device_privacy_option = click.option(
    "--device-privacy",
    metavar="gaussian:epsilon=…,delta=…",
    help="Budget of each device for noise of its own: updates without such noise, or beyond it, are refused.",
)

privacy_ledger_option = click.option(
    "--privacy-ledger",
    type=PATH,
    metavar="FOLDER",
    help="Folder of what is spent on privacy.  [default: privacy in --state]",
)


def partial_key_options(function: Function) -> Function:
    """The options `--key` and `--run`; `find_partial_seal` takes them."""
    run = click.option("--run", help="Name of the run that the partial is signed for.  [default: that of --allow]")
    key = click.option(
        "--key", type=PATH, metavar="FILE", help="Private key of this aggregator, to sign the partial with."
    )
    return key(run(function))


@contextmanager
def signature_gate(allow: Path | None, ledger: Path | None, state: Path | None, late: int) -> Iterator[Gate | None]:
    """The gate that only what is signed by a list passes; None without a list.

    Args:
        allow: The list.
        ledger: Folder of what was accepted.
        state: State folder, which has the ledger where no other folder is given.
        late: Most rounds by which an update may be late.
    """
    if allow is None:
        if ledger is not None:
            raise InputError("expected with --allow, found without; leave it out", key="ledger")
        yield None
        return
    folder = folder_of(ledger, state, "ledger", key="ledger", holding="what was accepted")
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.clients import read_clients
    from fedpara_edge.trust.ledger import open_ledger
    from fedpara_edge.trust.signatures import SignatureGate

    clients = read_clients(allow)
    with open_ledger(folder, clients.run) as opened:
        yield SignatureGate(clients, opened, max_staleness=late)


@contextmanager
def open_budget(privacy: str | None, ledger: Path | None, state: Path | None) -> Iterator[PrivacyLedger | None]:
    """The ledger of the budget of noise on the mean; None without noise.

    Args:
        privacy: The noise.
        ledger: Folder of the ledger.
        state: State folder, which has the ledger where no other folder is given.
    """
    if privacy is None:
        yield None
        return
    folder = privacy_folder(ledger, state)
    from fedpara_edge.cli.installed import require

    require("privacy")
    from fedpara_edge.privacy.accounting import epsilon
    from fedpara_edge.privacy.ledger import open_privacy_ledger

    with open_privacy_ledger(folder, epsilon) as opened:
        yield opened


def privacy_folder(ledger: Path | None, state: Path | None) -> Path:
    """The folder of what is spent on privacy.

    Raises:
        InputError: Neither it nor a state folder was given.
    """
    return folder_of(ledger, state, "privacy", key="privacy_ledger", holding="what is spent")


def find_partial_seal(key: Path | None, run: str | None, allow: Path | None) -> Ready | None:
    """The function that signs a partial with a private key for the run; None without a key.

    Raises:
        InputError: The key can't be read, or the run is not known or another than that of the list.
    """
    if key is None:
        if run is not None:
            raise InputError("expected with --key, found without; leave it out", key="run")
        return None
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.clients import read_clients
    from fedpara_edge.trust.envelope import write_partial_envelope
    from fedpara_edge.trust.keys import read_signer

    listed = None if allow is None else read_clients(allow).run
    name = run or listed
    if not name:
        raise InputError("expected the name of the run with --key, found none; give it", key="run")
    if listed is not None and name != listed:
        raise InputError(f"expected {listed!r}, that of {allow}, found {name!r}; leave it out", key="run")
    signer = read_signer(key)
    return lambda partial, output: write_partial_envelope(partial, output, signer, name)


def folder_of(given: Path | None, state: Path | None, name: str, *, key: str, holding: str) -> Path:
    """A folder that was given, or else that of a name in the state folder.

    Raises:
        InputError: There is neither.
    """
    if given is not None:
        return given
    if state is None:
        raise InputError(f"expected a folder for {holding}, found none; give it, or --state", key=key)
    return state / name


def say_unsigned(allow: Path | None) -> None:
    """Say that nothing is signed, where there is no list."""
    if allow is None:
        note("note: updates are not signed, so that anybody can send under any name; outside local work, pass --allow")
