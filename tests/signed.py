"""A federation whose keys, root and repository are ready, for tests of what is signed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpara_edge.trust.keys import new_key
from fedpara_edge.trust.publication import Additions, Lifetimes
from fedpara_edge.trust.repository import Published, publish
from fedpara_edge.trust.roots import make_root

RUN = "winter"
KEYS = ("alice", "bob", "carol", "targets", "online")


def make_keys(folder: Path) -> dict[str, Path]:
    """Key files by name, for three holders of root keys and two machines."""
    for name in KEYS:
        new_key(folder / name)
    return {name: folder / name for name in KEYS}


def first_root(folder: Path, keys: dict[str, Path], *, threshold: int = 2, signers: Sequence[str] = ()) -> Path:
    """Root metadata of version 1 in `root.json`, signed by as many as it asks for unless told otherwise."""
    path = folder / "root.json"
    roles = {
        "root": [keys[name].with_suffix(".pub") for name in KEYS[:3]],
        "targets": [keys["targets"]],
        "timestamp": [keys["online"]],
    }
    signing = [keys[name] for name in signers or KEYS[:threshold]]
    make_root(path, roles, days=365, threshold=threshold, signers=signing)
    return path


def release(
    folder: Path,
    root: Path,
    keys: dict[str, Path],
    *,
    by: Sequence[str] = ("targets", "online"),
    lifetimes: Lifetimes = Lifetimes(),  # noqa: B008  (frozen)
    bundle: Path | None = None,
    weights: Path | None = None,
    changes: tuple[Path, ...] = (),
) -> Published:
    """Publish in `folder`; a bundle for the run `RUN`."""
    additions = Additions(bundle=bundle, run=None if bundle is None else RUN, weights=weights, changes=changes)
    return publish(folder, root, additions, [keys[name] for name in by], lifetimes)
