"""The files that devices get, each under an address with a SHA-256 of its own, so that it can be kept for good.

files/bundle/<sha256 of manifest.json>/<name>   a file of the bundle; the manifest has the SHA-256 of the others
files/<sha256>                                  weights, a change, or a server state
"""

from __future__ import annotations

from pathlib import Path

from fedpara_edge.formats.bundle import MANIFEST, WEIGHTS
from fedpara_edge.formats.change import read_change_base
from fedpara_edge.formats.task import Step
from fedpara_edge.formats.weights import Weights
from fedpara_edge.serving.folder import ServerFolder
from fedpara_edge.storage.atomic import sha256_of


class Content:
    """What devices get in a round.

    Args:
        folder: State folder of the server.
        base: Weights of the round.
        keep: Most rounds back for which changes are offered.

    Attributes:
        bundle: Address of the bundle's folder.
        weights: Address of the whole weights.
        control: Address of the server state that devices need; None if there is none.
        history: Changes that lead to the weights.
    """

    def __init__(self, folder: ServerFolder, base: Weights, *, keep: int) -> None:
        self._files: dict[str, Path] = {}
        bundle = folder.bundle
        manifest = sha256_of(bundle.file(MANIFEST))
        self.bundle = f"files/bundle/{manifest}"
        for name in (MANIFEST, *bundle.manifest.files):
            self._files[f"bundle/{manifest}/{name}"] = bundle.file(name)
        self.weights = self._offer(folder.weights(base.round))
        control = folder.control(base.round)
        self.control = self._offer(control) if control.exists() else None
        self.history = self._history(folder, base, keep)

    def find(self, place: str) -> Path | None:
        """The file at an address, after `files/`; None if there is none."""
        return self._files.get(place)

    def is_counted(self, place: str) -> bool:
        """Whether a file is sent anew as rounds go by, as weights are; unlike the graphs, which a device gets once."""
        path = self._files[place]
        return not place.startswith("bundle/") or path.name == WEIGHTS

    def _offer(self, path: Path) -> str:
        digest = sha256_of(path)
        self._files[digest] = path
        return f"files/{digest}"

    def _history(self, folder: ServerFolder, base: Weights, keep: int) -> tuple[Step, ...]:
        """The changes of the last rounds without a gap, but for those that are no smaller than whole weights."""
        steps: list[Step] = []
        left = folder.weights(base.round).stat().st_size
        for number in range(base.round, max(base.round - keep, 0), -1):
            change = folder.change(number)
            left -= change.stat().st_size if change.exists() else left
            if left <= 0:
                break
            base_digest = read_change_base(change)
            steps.append(Step(base=base_digest, change=self._offer(change), bytes=change.stat().st_size))
        return tuple(reversed(steps))
