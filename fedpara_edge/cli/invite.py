"""`fedpara-edge invite`: a new link by which devices join."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, json_option
from fedpara_edge.cli.streams import drawing


@click.command("invite", cls=Command)
@click.argument("state", type=PATH)
@click.option(
    "--hours",
    type=click.FloatRange(0, min_open=True),
    default=24,
    show_default=True,
    help="Hours for which the link is good.",
)
@click.option(
    "--operator", is_flag=True, help="A link to the operator's page instead, whose token is that of /metrics too."
)
@json_option
def command(state: Path, hours: float, operator: bool, json: bool) -> None:
    """Show a new join link of the server whose state folder is STATE; on a terminal, as a QR code too.

    Links that were shown before stay good for their time. The server need not run.
    """
    from fedpara_edge.cli.installed import require

    require("serve")
    from fedpara_edge.serving.invitation import invite, operator_link

    link = (operator_link if operator else invite)(state, now=time.time(), hours=hours)
    emit({"link": link}, link, as_json=json)
    show_qr_code(link)


def show_qr_code(link: str) -> None:
    """Draw a link on the terminal that stderr is, if it is one."""
    from fedpara_edge.serving.invitation import qr_code

    if sys.stderr.isatty():
        drawing(sys.stderr).write(qr_code(link))
