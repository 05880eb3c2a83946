"""The device's side of a signed repository: what is verified against the root that the device trusts, and nothing else.

    metadata/              newest metadata that the device has seen, against which older ones are refused
    bundle/                the bundle
    weights.safetensors    the newest weights, after round 0
    model.onnx             the folded model, for predictions

Every file in this cache is verified again each time, by length and SHA-256 as they are signed. Weights are made from
the changes since those that are there where that takes fewer bytes: the result has to have the signed SHA-256 too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    SlowRetrievalError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient import FetcherInterface, TargetFile, Updater, Urllib3Fetcher
from urllib3.exceptions import HTTPError, TimeoutError
from urllib3.response import BaseHTTPResponse

from fedpara_edge.errors import FedparaError, InputError, TrustError, brief_text
from fedpara_edge.formats.bundle import MANIFEST
from fedpara_edge.formats.bundle import WEIGHTS as INITIAL_WEIGHTS
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.storage.arriving import arriving
from fedpara_edge.storage.locking import hold_folder
from fedpara_edge.storage.rounds import round_path
from fedpara_edge.storage.wholefile import check_regular, read_whole
from fedpara_edge.trust.repository import BUNDLE, CHANGES, MODELS, TRANSCRIPTS, WEIGHTS
from fedpara_edge.trust.roots import parse_root

_FOLDERS = (BUNDLE, WEIGHTS, MODELS, CHANGES, TRANSCRIPTS)
_PIECE = 1 << 20
_NEWEST, _MODEL, _TEMPORARY = "weights.safetensors", "model.onnx", "fetched"


@dataclass(frozen=True)
class Received:
    """What a device may run, as the root that it trusts has it signed.

    Args:
        bundle: Bundle folder in the cache.
        weights: Newest weights, in the cache too.
        run: Name of the federation's run.
        fetched_bytes: Size of all files that were fetched.
    """

    bundle: Path
    weights: Path
    run: str
    fetched_bytes: int


def receive(repository: str, root: Path, cache: Path) -> Received:
    """Fetch what is new in a repository and verify all of it, what was there before included.

    Args:
        repository: Folder of the repository, or the address of one (http or https).
        root: Root metadata that the device trusts.
        cache: Folder to keep what was verified in, made if it is missing.

    Raises:
        TrustError: Something is forged, changed, old or expired; `code` says which.
        InputError: The repository, or the root, can't be read.
        BusyError: Another process uses the cache.
        FedparaError: The repository can't be reached, or a file of it is missing.
    """
    with _visiting(repository, root, cache) as receiver:
        return receiver.receive()


def receive_model(repository: str, root: Path, cache: Path) -> Path:
    """Fetch the folded model of a repository and verify it, as `receive` does; its path in the cache.

    Raises:
        TrustError: Something is forged, changed, old or expired, or no model is published; `code` says which.
        InputError, BusyError, FedparaError: As of `receive`.
    """
    with _visiting(repository, root, cache) as receiver:
        return receiver.receive_model()


@contextmanager
def _visiting(repository: str, root: Path, cache: Path) -> Iterator[_Receiver]:
    """A visit, during which the cache is locked."""
    try:
        trusted = read_whole(root)
    except OSError as error:
        raise InputError(f"{root}: expected root metadata, found {error.strerror}; check the path") from error
    parse_root(root, trusted)
    with hold_folder(cache, kind="a cache", lock="lock"):
        yield _Receiver(repository, root, trusted, cache)


class _Receiver:
    """One visit of a device to a repository."""

    def __init__(self, repository: str, root: Path, trusted: bytes, cache: Path) -> None:
        self._repository, self._root, self._trusted, self._cache = repository, root, trusted, cache
        is_remote = repository.startswith(("http://", "https://"))
        if not is_remote and not Path(repository, "metadata").is_dir():
            raise InputError(
                f"{repository}: expected a repository's folder or an address of one, found no folder metadata in it; "
                "check the path"
            )
        self._fetcher = _Watching(_Web(app_user_agent="fedpara-edge") if is_remote else _Folder())
        self._fetched_bytes = 0

    def receive(self) -> Received:
        """Metadata first, then the bundle, then the weights."""
        with self._naming():
            updater = self._open()
            targets = self._targets(updater)
            manifest = targets.get(f"{BUNDLE}/{MANIFEST}")
            if manifest is None:
                raise TrustError(f"{self._repository}: expected a bundle in the list of files, found none")
            bundle = self._receive_bundle(updater, targets)
            weights = self._receive_weights(updater, targets)
        run = str((manifest.custom or {}).get("run", ""))
        return Received(bundle, weights, run, self._fetched_bytes)

    def receive_model(self) -> Path:
        """Metadata first, then the folded model."""
        path = self._cache / _MODEL
        with self._naming():
            updater = self._open()
            models = [target for name, target in self._targets(updater).items() if name.startswith(f"{MODELS}/")]
            if not models:
                raise TrustError(
                    f"{self._repository}: expected a folded model in the list of files, found none; publish --model"
                )
            self._fetch(updater, models[0], path)
        return path

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn what the libraries raise into errors by name."""
        try:
            yield
        except (RepositoryError, DownloadError, OSError) as error:
            raise self._refusal(error) from error

    def _open(self) -> Updater:
        metadata = self._cache / "metadata"
        metadata.mkdir(exist_ok=True)
        for stray in metadata.glob("tmp*"):  # the updater's, if it was killed
            stray.unlink()
        self._fetcher.last = str(self._root)
        updater = Updater(
            metadata_dir=str(metadata),
            metadata_base_url=f"{self._repository.rstrip('/')}/metadata",
            target_base_url=f"{self._repository.rstrip('/')}/targets",
            fetcher=self._fetcher,
            bootstrap=self._trusted,
        )
        updater.refresh()
        return updater

    def _targets(self, updater: Updater) -> dict[str, TargetFile]:
        """Signed list of files, from the metadata that the updater has just verified."""
        signed = Metadata[Targets].from_file(str(self._cache / "metadata" / "targets.json")).signed
        found = {name: updater.get_targetinfo(name) for name in signed.targets}
        for name in found:
            folder, _, file = name.partition("/")
            if folder not in _FOLDERS or Path(file).name != file or file in (".", ".."):
                raise TrustError(f"{self._repository}: target {name!r}: expected a name of ours, found another")
        return {name: target for name, target in found.items() if target is not None}

    def _receive_bundle(self, updater: Updater, targets: dict[str, TargetFile]) -> Path:
        folder = self._cache / BUNDLE
        folder.mkdir(exist_ok=True)
        names = {name.partition("/")[2]: target for name, target in targets.items() if name.startswith(f"{BUNDLE}/")}
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
        for name, target in names.items():
            self._fetch(updater, target, folder / name)
        return folder

    def _receive_weights(self, updater: Updater, targets: dict[str, TargetFile]) -> Path:
        newest = [target for name, target in targets.items() if name.startswith(f"{WEIGHTS}/")]
        if not newest:
            return self._cache / BUNDLE / INITIAL_WEIGHTS
        path = self._cache / _NEWEST
        if updater.find_cached_target(newest[0], str(path)) is None:
            self._apply_changes(updater, targets, newest[0], path)
        self._fetch(updater, newest[0], path)
        return path

    def _apply_changes(self, updater: Updater, targets: dict[str, TargetFile], newest: TargetFile, path: Path) -> None:
        """Bring the weights that are there up to date by changes, if these are there and smaller."""
        with suppress(FedparaError):  # whatever is wrong with them, whole weights do
            weights = read_weights(path if path.exists() else self._cache / BUNDLE / INITIAL_WEIGHTS)
            changes: list[TargetFile] = []
            while (name := round_path(Path(CHANGES), weights.round + 1 + len(changes)).as_posix()) in targets:
                changes.append(targets[name])
            if not changes or sum(change.length for change in changes) >= newest.length:
                return
            fetched = self._cache / _TEMPORARY
            for change in changes:
                self._fetch(updater, change, fetched)
                weights = apply_change(weights, fetched)
            fetched.unlink()
            write_weights(path, weights)

    def _fetch(self, updater: Updater, target: TargetFile, path: Path) -> None:
        if updater.find_cached_target(target, str(path)) is None:
            updater.download_target(target, str(path))
            self._fetched_bytes += target.length

    def _refusal(self, error: Exception) -> FedparaError:
        """The error by name, about the file that was fetched last."""
        where = self._fetcher.last
        if isinstance(error, DownloadHTTPError):
            return FedparaError(
                f"{where}: expected a file of the repository, found none (status {error.status_code}); copy the "
                "repository again, as a whole",
                code="incomplete",
            )
        is_target = "/metadata/" not in where
        if isinstance(error, LengthOrHashMismatchError | DownloadLengthMismatchError):
            if is_target:
                return TrustError(
                    f"{where}: expected the content that is signed, found a changed file; copy the repository again, "
                    "from a source you trust",
                    code="changed_file",
                )
            return TrustError(
                f"{where}: mix-and-match: expected the metadata that the timestamp names, found others; copy the "
                "repository again, as a whole",
                code="mix_and_match",
            )
        if isinstance(error, DownloadError | OSError):
            return FedparaError(f"{where}: expected to fetch it, found {_cause(error)}; try again", code="unreachable")
        if isinstance(error, ExpiredMetadataError):
            return TrustError(
                f"{self._repository}: freeze: expected metadata that have not expired, found: {error}; take a newer "
                "copy, or have it published again (and check this device's clock)",
                code="expired",
            )
        if isinstance(error, BadVersionNumberError):
            return TrustError(
                f"{where}: rollback: expected nothing older than this device has seen, found: {error}; take a newer "
                "copy",
                code="rollback",
            )
        if isinstance(error, UnsignedMetadataError):
            return TrustError(
                f"{where}: expected signatures of the keys that {self._root} leads to, found: {error}; it is forged, "
                "or the root is that of another repository",
                code="wrong_root",
            )
        return TrustError(f"{where}: expected metadata of a repository, found: {error}; copy it again")


class _Watching(FetcherInterface):
    """A fetcher that remembers what it was last asked for, for the message of an error, and gives up what is too slow.

    The updater itself takes no more bytes than are signed, or than its limit of each kind of metadata.

    Args:
        inner: Fetcher that does the work.
    """

    def __init__(self, inner: FetcherInterface) -> None:
        self._inner = inner
        self.last = ""

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.last = url
        try:
            yield from arriving(self._inner.fetch(url), name=url, max_bytes=sys.maxsize, remedy="")
        except HTTPError as error:  # of an answer that is no HTTP, which the library lets through
            raise DownloadError(f"an answer that can't be read: {error}") from error


class _Web(Urllib3Fetcher):
    """A fetcher of addresses that gives bytes as they arrive, undecoded, in place of whole pieces."""

    def _chunks(self, response: BaseHTTPResponse) -> Iterator[bytes]:
        try:
            while piece := response.read1(_PIECE, decode_content=False):
                yield piece
        except TimeoutError as error:
            raise SlowRetrievalError from error
        finally:
            response.release_conn()


class _Folder(FetcherInterface):
    """A fetcher of files, whose addresses are paths."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            check_regular(Path(url))
            file = Path(url).open("rb")  # noqa: SIM115  (closed when all of it was read)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DownloadHTTPError(f"{url}: no such file", 404) from error

        def pieces() -> Iterator[bytes]:
            with file:
                while piece := file.read(_PIECE):
                    yield piece

        return pieces()


def _cause(error: BaseException) -> str:
    """Innermost reason of an error, as far as it is told."""
    while error.__cause__ is not None:
        error = error.__cause__
    return brief_text(str(error), max_length=300) if str(error) else type(error).__name__
