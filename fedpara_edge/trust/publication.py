"""What is published in a signed repository, and for how long: options, without the libraries that sign."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.errors import InputError, brief
from fedpara_edge.options import check, option


@dataclass(frozen=True, kw_only=True)
class Lifetimes:
    """How long what is signed is good for, in days.

    Args:
        targets_days: Lifetime of the list of files.
        snapshot_days: Lifetime of the list of metadata.
        timestamp_days: Lifetime of the newest state, during which an attacker can hold a device back on it.
    """

    targets_days: int = option(365, minimum=1, maximum=36500, help="Days until the list of files expires.")
    snapshot_days: int = option(30, minimum=1, maximum=36500, help="Days until the list of metadata expires.")
    timestamp_days: int = option(
        7, minimum=1, maximum=36500, help="Days until the timestamp expires: how long devices can be held back."
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Additions:
    """Files to publish.

    Args:
        bundle: Bundle folder; takes the place of the bundle and of all that belonged with it.
        run: Name of the federation's run; needed with a bundle.
        weights: Weights of a round; take the place of those before.
        model: Folded model for `predict`; takes the place of the one before.
        changes: Change files.
        transcripts: Transcripts of rounds.
    """

    bundle: Path | None = None
    run: str | None = None
    weights: Path | None = None
    model: Path | None = None
    changes: tuple[Path, ...] = ()
    transcripts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if (self.bundle is None) != (self.run is None):
            raise InputError("expected together with a bundle, found one without the other", key="run")
        if self.run is not None and not (0 < len(self.run) <= 200 and self.run.isprintable()):
            raise InputError(f"expected 1 to 200 printable characters, found {brief(self.run)}", key="run")
