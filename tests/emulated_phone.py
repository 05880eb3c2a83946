"""A phone for tests: Chromium with the emulation of one, which does what it is told on the page (`phone/phone.mjs`)."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from phone_site import Site, serving
from phone_tools import PHONE, node, run_program
from small_net import without_verification

from export.build import make_bundle
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.recipe import Recipe

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.05, "seed": 3, "clip_norm": 1.0}


class Told(NamedTuple):
    """What a phone was told to read, and what left it."""

    read: list[str]
    requests: list[dict[str, Any]]

    def sent(self, site: Site) -> list[tuple[str, int]]:
        """Address and bytes of every request with a body; all requests went to the page's own server."""
        assert {request["url"].startswith(site.url) for request in self.requests if "blob:" not in request["url"]} == {
            True
        }
        sent = [request for request in self.requests if request["method"] != "GET" or request["bytes"]]
        return [(request["url"].removeprefix(site.url), request["bytes"]) for request in sent]


class Phone:
    """An emulated phone.

    Args:
        profile: Folder of what its browser keeps.
        data: Its examples.
        url: Address of the page.
        options: Options of its browser.
    """

    def __init__(self, profile: Path, data: Path, url: str, *options: str) -> None:
        self._profile, self.data, self.url, self._options = profile, data, url, options

    def with_options(self, *options: str) -> Phone:
        """The same phone, with these options of its browser."""
        return Phone(self._profile, self.data, self.url, *options)

    def do(self, *actions: tuple[str, Any]) -> Told:
        """Do what phone.mjs calls by these names, on the page with the examples picked."""
        begun = (("open", self.url), ("until", "ready"), ("pick", str(self.data)))
        return self.do_alone(*begun, *actions)

    def do_alone(self, *actions: tuple[str, Any]) -> Told:
        """Do these actions and no others."""
        browser = run_program("sh", PHONE / "browser.sh").strip()
        command = [node(), str(PHONE / "phone.mjs"), browser, str(self._profile), *self._options]
        done = subprocess.run(command, input=json.dumps(actions), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return Told(**json.loads(done.stdout))


def picking(data: Path) -> str:
    """Script that picks a file with examples and waits for nothing."""
    content = base64.b64encode(data.read_bytes()).decode()
    return f"""{{
        const given = new DataTransfer(), input = document.getElementById('file');
        given.items.add(new File([Uint8Array.from(atob('{content}'), (c) => c.charCodeAt(0))], '{data.name}'));
        input.files = given.files;
        input.dispatchEvent(new Event('change'));
    }}"""


def ask(site: Site, settings: dict[str, Any], **further: Any) -> None:
    """Ask for a call from the initial weights of the bundle, unless told otherwise."""
    site.ask_for(
        {"bundle": "bundle", "weights": f"bundle/{WEIGHTS}", "updates": "updates", "settings": settings, **further}
    )


@contextmanager
def collecting(page: Path, folder: Path, **recipe: Any) -> Iterator[tuple[Site, Bundle]]:
    """A server that asks for a call of a model of the zoo."""
    with without_verification():
        bundle = make_bundle(Recipe(engines=("onnxruntime",), **recipe), folder / "bundle").bundle
    with serving(Site(page)) as site:
        site.hand_out("bundle", bundle.path)
        ask(site, SETTINGS)
        yield site, bundle
