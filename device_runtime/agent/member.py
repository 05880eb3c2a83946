"""A member of a federation: its place there, and what it has of the server.

STATE/member.json           {"url", "client", "secret", "token"}; readable by its owner alone
STATE/ca.pem                certificate that vouches for the server, if the join link named one
STATE/bundle-<digest>/      the bundle
STATE/weights.safetensors   weights of the newest round that this device has
STATE/control.safetensors   server state of that round, for scaffold
STATE/change.safetensors    the change that is being applied
STATE/own/                  the device's state folder (`device_runtime.state`)
STATE/update.safetensors    an update that was not sent yet, and update.safetensors.json, where it is being sent
"""

from __future__ import annotations

import json
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from device_runtime.agent.connection import Answer, Connection
from device_runtime.agent.link import JoinLink
from device_runtime.agent.transfers import MAX_FILE_BYTES, fetch
from fedpara_edge.errors import (
    FedparaError,
    InputError,
    InvalidUpdateError,
    TrustError,
    WrongBundleError,
    brief_text,
)
from fedpara_edge.formats.bundle import MANIFEST, WEIGHTS, Bundle, open_bundle, read_manifest
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.task import Task, read_task
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.storage.atomic import remove_leftovers_in, replacing_file
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import MAX_BYTES, read_text

WAIT_SECONDS = 50
"""Time for which the server may keep a request for a task waiting."""
TASK = "task.json"


class NotJoinedError(TrustError):
    """The server does not let this device in: exit code 5."""

    code = "not_joined"


class Member:
    """A member's folder and its way to the server.

    Args:
        folder: Folder of the member, which exists.
        connection: Way to the server.

    Attributes:
        client: Name of the device; None before it joined.
        received_bytes: Number of bytes received so far, of bundle, weights and changes.
    """

    def __init__(self, folder: Path, connection: Connection) -> None:
        self.folder, self.connection = folder, connection
        remove_leftovers_in(folder)
        kept = self._read_kept()
        self._secret = kept.get("secret") or secrets.token_hex(16)
        self.client: str | None = kept.get("client")
        connection.token = kept.get("token")
        self.received_bytes = 0

    @property
    def own(self) -> Path:
        """The device's state folder."""
        return self.folder / "own"

    @property
    def update(self) -> Path:
        """File of the update that is to be sent."""
        return self.folder / "update.safetensors"

    @property
    def weights(self) -> Path:
        """Weights of the round."""
        return self.folder / "weights.safetensors"

    def join(self, link: JoinLink, client: str | None) -> None:
        """Join the federation, unless this device has.

        Args:
            link: Join link.
            client: Name to join under; None for one that is made.

        Raises:
            NotJoinedError: The server does not let it in.
            InputError: The name is taken, or it has another already.
            UnreachableError: The server gives no answer.
        """
        if self.connection.token is not None:
            if client is not None and client != self.client:
                raise InputError(
                    f"expected {self.client!r}, under which this device joined, found {client!r}; leave it out, or "
                    "take another --state",
                    key="client",
                )
            return
        if link.token is None:
            raise InputError(
                f"{self.connection.url}: expected a join link with join=, found none; copy the whole link that the "
                "server shows"
            )
        self._keep({"secret": self._secret})  # so that a second try is the same device
        self.connection.token = link.token
        body = json.dumps({"client": client, "secret": self._secret}).encode()
        try:
            answer = self.connection.request("POST", "join", body=body, headers={"Content-Type": "application/json"})
        finally:
            self.connection.token = None
        if answer.status == 409:
            raise InputError(answer.sentence, key="client")
        found = self._checked(answer, 201)
        try:
            joined = strict_json(found.content.decode("utf-8"))
            self.client, self.connection.token = str(joined["client"]), str(joined["token"])
        except (KeyError, TypeError, ValueError) as error:
            raise FedparaError(f"{self.connection.url}: expected a token, found {error}; check the address") from error
        kept = {"client": self.client, "secret": self._secret, "token": self.connection.token}
        self._keep({"url": self.connection.url, **kept})

    def task(self, *, wait: bool) -> Task:
        """The task of this device; if asked for, once there is something to train, or after a while.

        Raises:
            NotJoinedError: The server does not know this device.
            UnreachableError: The server gives no answer.
            FedparaError: It is another server.
        """
        headers = {"Prefer": f"wait={WAIT_SECONDS}"} if wait else {}
        answer = self.connection.request("GET", TASK, headers=headers, timeout=WAIT_SECONDS + 30)
        return read_task(self._checked(answer, 200).content, source=f"{self.connection.url}{TASK}")

    def bundle(self, task: Task) -> Bundle:
        """The bundle of a task, as far as it is there already and fetched for the rest.

        Raises:
            UnreachableError, MissingError, FedparaError: As of `transfers.fetch`.
            WrongBundleError: The server has another one.
        """
        digest = task.bundle.rpartition("/")[2]
        folder = self.folder / f"bundle-{digest[:16]}"
        folder.mkdir(exist_ok=True)
        self._fetch(f"{task.bundle}/{MANIFEST}", folder / MANIFEST, digest, max_bytes=MAX_BYTES)
        manifest = read_manifest(folder / MANIFEST)
        for name, entry in manifest.files.items():
            if Path(name).name != name:
                raise WrongBundleError(f"{task.bundle}: expected files in the folder alone, found {name!r}")
            self._fetch(f"{task.bundle}/{name}", folder / name, str(entry["sha256"]), max_bytes=entry["bytes"])
        for other in self.folder.glob("bundle-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return open_bundle(folder)

    def receive(self, task: Task, bundle: Bundle) -> Path | None:
        """Bring the weights up to those of a task, by changes where there are any; the server state, if there is one.

        Raises:
            UnreachableError, MissingError, FedparaError: As of `transfers.fetch`.
            WrongBundleError: What the server has does not go together.
        """
        if not self.weights.exists():
            with replacing_file(self.weights) as temporary:  # which the bundle brought
                shutil.copyfile(bundle.file(WEIGHTS), temporary)
        if not self._apply_changes(task, bundle):
            self._fetch(task.weights, self.weights, task.weights.rpartition("/")[2])
        found = read_weights(self.weights, bundle)
        if found.base != task.base:
            raise WrongBundleError(
                f"{self.connection.url}: expected weights {task.base[:12]}… of round {task.round}, found "
                f"{found.base[:12]}…; the server has to be repaired"
            )
        if task.control is None:
            return None
        control = self.folder / "control.safetensors"
        self._fetch(task.control, control, task.control.rpartition("/")[2])
        return control

    def _apply_changes(self, task: Task, bundle: Bundle) -> bool:
        """Whether the weights could be made from those that are there."""
        with suppress(InputError, WrongBundleError, InvalidUpdateError):  # whatever is wrong, whole weights do
            weights = read_weights(self.weights, bundle)
            changes = task.changes_from(weights.base)
            if changes is None:
                return False
            fetched = self.folder / "change.safetensors"
            for step in changes:
                self._fetch(step.change, fetched, step.change.rpartition("/")[2])
                weights = apply_change(weights, fetched)
                write_weights(self.weights, weights)
            return True
        return False

    def _fetch(self, place: str, target: Path, digest: str, *, max_bytes: int = MAX_FILE_BYTES) -> None:
        self.received_bytes += fetch(self.connection, place, target, digest, max_bytes=min(max_bytes, MAX_FILE_BYTES))

    def _checked(self, answer: Answer, expected: int) -> Answer:
        if answer.status == expected:
            return answer
        if answer.status in (401, 403):
            raise NotJoinedError(f"{self.connection.url}: {answer.sentence}")
        raise FedparaError(
            f"{self.connection.url}: expected a server of `fedpara-edge serve`, found status {answer.status}: "
            f"{answer.sentence}; check the address"
        )

    def _read_kept(self) -> dict[str, str]:
        path = self.folder / "member.json"
        if not path.exists():
            return {}
        try:
            found = strict_json(read_text(path))
            kept = {str(name): str(value) for name, value in found.items()}
        except (AttributeError, OSError, ValueError) as error:
            raise InputError(
                f"{path}: expected what the server gave, found {error}; delete it and join again"
            ) from error
        if "url" in kept and kept["url"] != self.connection.url:
            raise InputError(
                f"{self.folder}: expected a device of {brief_text(kept['url'])}, found the address "
                f"{self.connection.url}; take another --state for another federation, or delete member.json in it "
                "if the server has moved"
            )
        return kept

    def _keep(self, content: dict[str, str]) -> None:
        with replacing_file(self.folder / "member.json", mode=0o600) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
