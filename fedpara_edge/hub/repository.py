"""Push to a repository of the Hub, and pull from it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedpara_edge.errors import FedparaError, InputError, WrongBundleError, brief_text, counted
from fedpara_edge.formats.bundle import MANIFEST, open_bundle, read_manifest
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.hub.answers import bound_answers, http_errors, understanding
from fedpara_edge.hub.card import MARK, model_card
from fedpara_edge.hub.download import MAX_DOWNLOAD_BYTES, Download
from fedpara_edge.installation import install_line
from fedpara_edge.storage.atomic import check_output, replacing_file, replacing_folder
from fedpara_edge.storage.rounds import round_path
from fedpara_edge.storage.wholefile import MAX_BYTES, read_whole

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
WEIGHTS = Path("weights")
_ROUND = re.compile(r"weights/round-(0|[1-9][0-9]{0,12})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was pushed.

    Args:
        address: Address of the commit.
        files: Names of the files in the repository.
        kept_card: Whether the repository has a card of somebody else's, which stays.
    """

    address: str
    files: tuple[str, ...]
    kept_card: bool = False


def push(path: Path, repository: str, *, private: bool = False) -> Pushed:
    """Push a bundle with its model card, or weights of it, in one commit.

    Args:
        path: Bundle folder, or weights file.
        repository: Name of the repository, as `owner/name`; made if it is missing.
        private: Whether only its owner sees a repository that is made.

    Raises:
        InputError: There is nothing of the kind at `path`, or huggingface_hub is not installed.
        WrongBundleError: The bundle is damaged, or the repository has another than the weights'.
        FedparaError: The Hub refuses, or can't be reached.
    """
    api = _api()
    if not path.is_dir():
        return _push_weights(api, path, repository)
    manifest = open_bundle(path).manifest
    files: dict[str, Path | bytes] = {name: path / name for name in (*manifest.files, MANIFEST)}
    with _asking(repository):
        with understanding(repository):
            api.create_repo(repository, private=private, exist_ok=True)
            has_card = api.file_exists(repository, CARD)
        card = _read_card(api, repository) if has_card else MARK
        if MARK in card:
            files[CARD] = model_card(manifest, repository).encode()
        address = _commit(api, repository, files, f"Bundle {manifest.fingerprint[:12]}")
    return Pushed(address=address, files=tuple(sorted(files)), kept_card=CARD not in files)


def _push_weights(api: HfApi, path: Path, repository: str) -> Pushed:
    weights = read_weights(path)
    name = round_path(WEIGHTS, weights.round).as_posix()
    with _asking(repository), tempfile.TemporaryDirectory() as place:
        _check_fingerprint(Download(api, repository), repository, weights.fingerprint, path, Path(place))
        address = _commit(api, repository, {name: path}, f"Weights after {counted(weights.round, 'round')}")
    return Pushed(address=address, files=(name,))


def _commit(api: HfApi, repository: str, files: Mapping[str, Path | bytes], message: str) -> str:
    """Commit files; the address of the commit."""
    from huggingface_hub import CommitOperationAdd

    with understanding(repository):
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        return brief_text(str(api.create_commit(repository, added, commit_message=message).commit_url), max_length=1000)


def pull_bundle(
    repository: str,
    output: Path,
    *,
    revision: str | None = None,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Pull the bundle of a repository.

    Args:
        repository: Name of the repository, as `owner/name`.
        output: Bundle folder to make.
        revision: Branch, tag or commit; None for the main branch.
        max_bytes: Most bytes of all files together.
        overwrite: Whether to replace an existing folder.

    Raises:
        InputError: The package huggingface_hub is not installed.
        OutputExistsError: The folder exists, and `overwrite` is false.
        WrongBundleError: There is no bundle, or it is damaged.
        TooMuchError: There are more bytes than the limit, or than the manifest says.
        FedparaError: The Hub refuses, is too slow, or can't be reached.
    """
    check_output(output, overwrite=overwrite, folder=True)
    api = _api()
    with replacing_folder(output) as made:
        with _asking(repository):
            download = Download(api, repository, revision, max_bytes=max_bytes)
            manifest = read_manifest(download.fetch(MANIFEST, made / MANIFEST, max_bytes=MAX_BYTES))
            for name in manifest.files:
                if Path(name).name != name:
                    raise WrongBundleError(f"{repository}: expected names of files in {MANIFEST}, found {name!r}")
            sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
            download.expect(sizes)
            for name, size in sizes.items():
                download.fetch(name, made / name, listed=size)
        open_bundle(made)
    return output


def pull_weights(
    repository: str,
    output: Path,
    *,
    revision: str | None = None,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
    overwrite: bool = False,
) -> int:
    """Pull the newest weights of a repository, or the initial ones if there are none of later rounds; their round.

    Args:
        repository: Name of the repository, as `owner/name`.
        output: Weights file to write.
        revision: Branch, tag or commit; None for the main branch.
        max_bytes: Most bytes of all files together.
        overwrite: Whether to replace an existing file.

    Raises:
        InputError: The package huggingface_hub is not installed, or the file is no weights file.
        OutputExistsError: The file exists, and `overwrite` is false.
        WrongBundleError: The weights are of another bundle than the repository's.
        TooMuchError: There are more bytes than the limit, or than the manifest says.
        FedparaError: The Hub refuses, is too slow, or can't be reached.
    """
    check_output(output, overwrite=overwrite)
    api = _api()
    with _asking(repository), tempfile.TemporaryDirectory() as place:
        download = Download(api, repository, revision, max_bytes=max_bytes)
        rounds = [int(found[1]) for name in download.names() if (found := _ROUND.fullmatch(name))]
        name = round_path(WEIGHTS, max(rounds)).as_posix() if rounds else "weights.safetensors"
        path = download.fetch(name, Path(place, "weights.safetensors"))
        weights = read_weights(path)
        _check_fingerprint(download, repository, weights.fingerprint, Path(name), Path(place))
        with replacing_file(output) as temporary:
            shutil.copyfile(path, temporary)
    return weights.round


def _check_fingerprint(download: Download, repository: str, fingerprint: str, path: Path, place: Path) -> None:
    manifest = read_manifest(download.fetch(MANIFEST, place / MANIFEST, max_bytes=MAX_BYTES))
    if manifest.fingerprint != fingerprint:
        raise WrongBundleError(
            f"{path}: expected weights of the bundle in {repository} ({manifest.fingerprint[:12]}), found those of "
            f"another ({fingerprint[:12]}); push that bundle first, or take another repository"
        )


def _read_card(api: HfApi, repository: str) -> str:
    with tempfile.TemporaryDirectory() as place:
        path = Download(api, repository).fetch(CARD, Path(place, CARD), max_bytes=MAX_BYTES)
        return read_whole(path).decode("utf-8", "replace")


def _api() -> HfApi:
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # its transfers have a client of their own, which nothing bounds
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise InputError(f"expected huggingface_hub, found none ({error}); {install_line('hub')}") from error
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="fedpara-edge")
    bound_answers(api.endpoint)
    return api


@contextmanager
def _asking(repository: str) -> Iterator[None]:
    """Have an error of the Hub, of whatever kind, say in one line what was asked of whom."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    lost: tuple[type[Exception], ...] = (OSError, *http_errors())
    try:
        yield
    except FedparaError:
        raise
    except HFValidationError as error:
        raise InputError(
            f"expected a name as owner/name, found {repository!r}: {_line(error)}", key="repository"
        ) from error
    except RepositoryNotFoundError as error:
        raise FedparaError(
            f"{repository}: expected a repository that this token may use, found none; check the name, and log in with "
            "`hf auth login` or HF_TOKEN"
        ) from error
    except EntryNotFoundError as error:
        raise WrongBundleError(
            f"{repository}: expected a bundle, found a file of it missing ({_line(error)}); push the bundle first"
        ) from error
    except HfHubHTTPError as error:
        raise FedparaError(f"{repository}: expected the Hub to take this, found {_line(error)}") from error
    except lost as error:
        raise FedparaError(
            f"{repository}: expected to reach the Hub, found {_line(error)}; check the network, and HF_ENDPOINT for "
            "another server"
        ) from error


def _line(error: Exception) -> str:
    return brief_text(" ".join(str(error).split()), max_length=200)
