"""`fedpara-edge serve`: a server for devices and phones."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from device_runtime.config import OWN, TrainCall
from device_runtime.sources import Reading
from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.algorithms import check_halves
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.gates import allow_option, device_privacy_option, say_unsigned
from fedpara_edge.cli.invite import show_qr_code
from fedpara_edge.cli.log import event, filled
from fedpara_edge.cli.options import DATA, PATH, options_of
from fedpara_edge.cli.output import note
from fedpara_edge.errors import InputError
from fedpara_edge.serving.config import ServeConfig

if TYPE_CHECKING:
    from fedpara_edge.serving.running import Encryption, Running

EVERYWHERE, LOCAL = ("0.0.0.0", "::"), ("127.0.0.1", "::1", "localhost")
"""Hosts that stand for all addresses of this machine, and those that nobody else reaches."""
UNSERVED = ("strict",)
"""Options of `aggregate` that a server has no use for."""


@click.command("serve", cls=Command)
@click.argument("bundle", type=PATH)
@click.option("--state", type=PATH, required=True, help="The server's state folder, made if it is missing.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on.")
@click.option("--url", help="Address under which devices reach the server.  [default: of host and port]")
@click.option("--tls-certificate", type=PATH, metavar="FILE", help="Certificate to answer over TLS with, PEM.")
@click.option("--tls-key", type=PATH, metavar="FILE", help="Private key of --tls-certificate, PEM.")
@click.option(
    "--tls-lan", is_flag=True, help="Answer over TLS with a certificate made for this machine's names and addresses."
)
@click.option(
    "--page",
    type=PATH,
    help="Folder of the page for phones, as `make page` writes it.  [default: the one of this installation, if any]",
)
@click.option("--test", type=PATH, help=f"Data to evaluate the weights of each round on. {DATA}")
@options_of(Reading, into="reading")
@options_of(ServeConfig, into="config")
@options_of(TrainCall, without=("algorithm", *OWN), into="train")
@click.option(
    "--client-algorithm",
    default="fedavg",
    metavar="NAME[:OPTION=VALUE,…]",
    show_default=True,
    help="Client algorithm, as --algorithm of `train`.",
)
@options_of(AggregateConfig, without=UNSERVED, into="aggregate")
@allow_option
@device_privacy_option
def command(
    bundle: Path,
    state: Path,
    host: str,
    port: int,
    url: str | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_lan: bool,
    page: Path | None,
    test: Path | None,
    reading: Mapping[str, Any],
    config: Mapping[str, Any],
    train: Mapping[str, Any],
    client_algorithm: str,
    aggregate: Mapping[str, Any],
    allow: Path | None,
    device_privacy: str | None,
) -> None:
    """Serve BUNDLE to devices, which train it round by round, and put their updates together.

    Devices join by the link that is shown (`fedpara-edge device`). Rounds open and close by themselves. Everything is
    in the state folder: the same command goes on after any end of this one, and no update that was taken is lost or
    counts twice. `fedpara-edge report` makes a page of that folder. Ctrl-C or SIGTERM ends it.
    """
    from fedpara_edge.cli.installed import require

    require("serve")
    if test is not None:
        require("device")
    elif reading:
        raise InputError("expected with --test, found without; leave it out", key=next(iter(reading)))
    for extra, is_needed in (("trust", allow), ("privacy", aggregate.get("privacy"))):
        if is_needed:
            require(extra)
    from fedpara_edge.formats.bundle import open_bundle
    from fedpara_edge.serving.evaluating import EvaluationSet
    from fedpara_edge.serving.guarding import Demands
    from fedpara_edge.serving.running import run_server

    call = TrainCall(**train, algorithm=client_algorithm)
    aggregation = AggregateConfig(**aggregate)
    try:
        check_halves(call.client_algorithm, aggregation.server_algorithm)
    except InputError as error:
        raise error.about("client_algorithm") from error
    serving = ServeConfig(**config)
    if aggregation.min_updates > serving.updates:
        raise InputError(
            f"expected at most {serving.updates}, as many as close a round, found {aggregation.min_updates}",
            key="min_updates",
        )

    _check_encryption(tls_certificate, tls_key, tls_lan)

    def encrypt(folder: Path) -> Encryption | None:
        name = urlsplit(url).hostname if url else None
        return _encryption(tls_certificate, tls_key, folder if tls_lan else None, {host, *([name] if name else [])})

    def show(running: Running) -> None:
        _show(running, url or _url_of(running), state, serving, allow)

    run_server(
        open_bundle(bundle),
        state,
        aggregation,
        serving,
        {**train, "algorithm": client_algorithm},
        host=host,
        port=port,
        page=page or installed_page(),
        test=None if test is None else EvaluationSet(data=test, reading=Reading(**reading)),
        demands=Demands(allow=allow, device_privacy=device_privacy),
        encrypt=encrypt,
        on_event=_report,
        on_ready=show,
    )


def installed_page() -> Path | None:
    """Folder of the page that came with this installation; None if it has none, as of a wheel without `make wheel`."""
    import device_runtime

    folder = Path(device_runtime.__file__).parent / "web" / "page"
    return folder if folder.is_dir() else None


def _check_encryption(certificate: Path | None, key: Path | None, is_made: bool) -> None:
    if (certificate is None) != (key is None):
        missing = "tls_key" if key is None else "tls_certificate"
        raise InputError("expected the certificate and its key, found one of them; give both", key=missing)
    if certificate is not None and is_made:
        raise InputError("expected without --tls-certificate, found with it; leave one of them out", key="tls_lan")


def _encryption(
    certificate: Path | None, key: Path | None, state: Path | None, names: Collection[str]
) -> Encryption | None:
    """The certificate that was given, or one made in a state folder; None for neither."""
    from fedpara_edge.serving.certificates import AUTHORITY, CERTIFICATE, KEY, keep_certificates, local_names
    from fedpara_edge.serving.running import Encryption

    if certificate is not None and key is not None:
        return Encryption(certificate=certificate, key=key)
    if state is None:
        return None
    folder = state / "tls"
    if keep_certificates(folder, local_names() | {*names} - {*EVERYWHERE}, authority="fedpara-edge"):
        note(f"{folder / AUTHORITY}: a new certificate; phones have to trust it before they open the link")
    return Encryption(certificate=folder / CERTIFICATE, key=folder / KEY, authority=folder / AUTHORITY)


def _url_of(running: Running) -> str:
    """Address under which devices of the network reach a server."""
    from fedpara_edge.serving.certificates import local_address

    reached = local_address() if running.host in EVERYWHERE else running.host
    address = f"[{reached}]" if ":" in reached else reached
    return f"{'http' if running.encryption is None else 'https'}://{address}:{running.port}/"


def _show(running: Running, url: str, state: Path, config: ServeConfig, allow: Path | None) -> None:
    """Say where the server is, and how devices join."""
    from fedpara_edge.serving.invitation import invite, keep_address

    keep_address(state, url, None if running.encryption is None else running.encryption.authority)
    link = invite(state, now=time.time(), hours=config.join_hours)
    event("serving", host=running.host, port=running.port, round=running.federation.number)
    note(f"round {running.federation.number + 1}, serving at {url}; for {config.join_hours:g} h devices join with")
    if running.host not in LOCAL:
        say_unsigned(allow)
    if running.encryption is None and running.host not in LOCAL:
        note("note: without TLS, whoever listens on the network can read tokens and updates; pass --tls-lan")
    click.echo(link)
    show_qr_code(link)


def _report(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event, and tell of it in a line."""
    event(name, level=level, **fields)
    if name in _LINES:
        scores = {"accuracy": ".2%", "loss": ".4f"}
        shown = ", ".join(
            f"{score} {fields[score]:{as_}}" for score, as_ in scores.items() if fields.get(score) is not None
        )
        note(filled(_LINES[name], **fields, shown=shown or "a loss that is not finite"))


_LINES = {
    "device_joined": "{client} joined",
    "round_written": "{output}: round {round} from {accepted:update} ({examples:example}), {rejected} rejected, "
    "{stragglers} did not come back",
    "round_evaluated": "round {round}: {shown} on {examples:example}",
    "update_refused": "refused the {message}",
    "list_read": "the list of clients was changed: it counts as it is now",
    "round_reopened": "round {round} goes on: {message}",
    "error": "Error: {message}",
}
"""What is told of an event, by its name."""
