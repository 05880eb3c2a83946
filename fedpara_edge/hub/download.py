"""Downloads from a Hub, of which none is larger than was expected, by the client of huggingface_hub.

Its own functions write whatever a server sends. Here the answers, which are bounded (`answers`), are read piece by
piece and counted: all of a download together against a limit of the user's, and a file against its size in the
manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from fedpara_edge.errors import FedparaError, WrongBundleError, brief, counted
from fedpara_edge.hub.answers import Limit, understanding
from fedpara_edge.storage.arriving import TooMuchError
from fedpara_edge.storage.wholefile import MAX_BYTES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_DOWNLOAD_BYTES = 4 << 30
"""Most bytes of all files of one download, by default."""


class Download:
    """Files of one repository, which together have a limit.

    Args:
        api: Interface of the Hub.
        repository: Name of the repository, as `owner/name`.
        revision: Branch, tag or commit; None for the main branch.
        max_bytes: Most bytes of all files together.
    """

    def __init__(
        self, api: HfApi, repository: str, revision: str | None = None, *, max_bytes: int = MAX_DOWNLOAD_BYTES
    ) -> None:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repository)
        self._api, self._repository, self._revision = api, repository, revision or "main"
        self._max_bytes, self._left = max_bytes, max_bytes

    def names(self) -> list[str]:
        """Names of all files of the repository.

        Raises:
            TooMuchError: The list is too long.
            FedparaError: There is no list.
        """
        revision = quote(self._revision, safe="")
        url = f"{self._api.endpoint}/api/models/{self._repository}/revision/{revision}"
        with self._asking(url, MAX_BYTES) as pieces:
            content = b"".join(pieces)
        return read_names(content, self._repository)

    def expect(self, sizes: dict[str, int]) -> None:
        """Refuse files that are too large together, before any of them is asked for.

        Raises:
            TooMuchError: They are.
        """
        total = sum(sizes.values())
        if total > self._left:
            raise TooMuchError(
                f"{self._repository}: expected at most {self._max_bytes} bytes, found {total} in its "
                f"{counted(len(sizes), 'file')}; {_RAISE}"
            )

    def fetch(self, name: str, target: Path, *, listed: int | None = None, max_bytes: int | None = None) -> Path:
        """Fetch a file.

        Args:
            name: Name in the repository.
            target: File to write; there is none after an error.
            listed: Size of the file as the manifest lists it; None for a file that is not in a manifest.
            max_bytes: Largest size that it may have; None for what is left of the limit.

        Raises:
            WrongBundleError: It is larger than the manifest says.
            TooMuchError: It is larger than it may be, or than what is left of the limit.
            TooSlowError: It arrives too slowly.
        """
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self._repository, name, revision=self._revision, endpoint=self._api.endpoint)
        most = min(self._left, *(each for each in (listed, max_bytes) if each is not None), self._max_bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._asking(url, most) as pieces, target.open("wb") as file:
                for piece in pieces:
                    self._left -= file.write(piece)
        except BaseException as error:
            target.unlink(missing_ok=True)
            if isinstance(error, TooMuchError) and most == listed:
                raise WrongBundleError(
                    f"{url}: expected the content that manifest.json lists, {listed} bytes, found more; pull another "
                    "revision, or push the bundle again"
                ) from error
            raise
        return target

    @contextmanager
    def _asking(self, url: str, max_bytes: int) -> Iterator[Iterator[bytes]]:
        """The pieces of an answer.

        Raises:
            TooMuchError: The answer says that it is larger.
            FedparaError: There is none.
        """
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers(token=self._api.token, library_name="fedpara-edge")
        limit = Limit(max_bytes, _RAISE)
        with get_session().stream("GET", url, headers=headers, extensions=limit.extensions) as found:
            if found.status_code >= 300:
                found.read()
                with understanding(self._repository):
                    hf_raise_for_status(found)
                raise FedparaError(f"{url}: expected an answer, found status {found.status_code}; check HF_ENDPOINT")
            yield found.iter_raw()


def read_names(content: bytes, repository: str) -> list[str]:
    """Names of the files of a repository, from the answer of the Hub, which is JSON.

    Args:
        content: The answer.
        repository: Name of the repository, for the error.

    Raises:
        FedparaError: It is no list of files.

    >>> read_names(b'{"siblings": [{"rfilename": "manifest.json"}]}', "ann/digits")
    ['manifest.json']
    """
    try:
        found = [each["rfilename"] for each in json.loads(content)["siblings"]]
        if not all(isinstance(name, str) for name in found):
            raise TypeError("names that are none")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FedparaError(
            f"{repository}: expected a list of its files, found none ({brief(str(error))}); check HF_ENDPOINT"
        ) from error
    return found


_RAISE = "take another repository, or raise the limit if you trust this one (--max-mb)"
