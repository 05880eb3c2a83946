"""The result of an aggregation: the next weights, what was taken and what was refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.contribution import Contribution
from fedpara_edge.aggregation.gap import Gap, finite
from fedpara_edge.aggregation.gate import Identity
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.aggregation.screening import Rejected
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.formats.serverstate import ServerState
from fedpara_edge.formats.weights import Weights

if TYPE_CHECKING:
    from fedpara_edge.aggregation.refit import Refit


@dataclass(frozen=True)
class Accepted:
    """An update that is in the mean.

    Args:
        path: The file.
        client: Name of the client, from the header as what follows.
        examples: Number of examples it was trained on.
        steps: Number of steps it took.
        metrics: Numbers that it states.
        bytes: Size of the file.
        share: Weight in the mean; that of a rule which picks some is 0 for the others.
        norm: Norm of the change of trained tensors.
        norm_in_medians: Largest norm of the change over the median of the round; None where that means nothing.
        scale: Factor by which the change was scaled down; 1 if it was not.
        bounded: Names of the bounds that made it count for less (`bounds`).
        staleness: Number of rounds by which it was late.
        sha256: Digest of the file, hexadecimal; None where it was not needed.
    """

    path: Path
    client: str
    examples: int
    steps: int
    metrics: Mapping[str, float]
    bytes: int
    share: float
    norm: float
    norm_in_medians: float | None
    scale: float
    bounded: tuple[str, ...]
    staleness: int = 0
    sha256: str | None = None

    @classmethod
    def of(cls, contribution: Contribution, **counted: Any) -> Accepted:
        """Facts about a contribution.

        Args:
            contribution: The contribution.
            counted: The fields from `share` on that tell how it counted.
        """
        header = contribution.header
        return cls(
            path=contribution.path,
            client=header.client,
            examples=header.examples,
            steps=header.steps,
            metrics=header.metrics,
            bytes=contribution.bytes,
            norm=contribution.norms[0],
            sha256=contribution.sha256,
            **counted,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; what there is none of is left out."""
        found = {**vars(self), "path": str(self.path), "metrics": dict(self.metrics), "bounded": list(self.bounded)}
        return found if self.sha256 else {name: value for name, value in found.items() if name != "sha256"}


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """The next weights, and how they came about.

    Args:
        weights: Weights of the next round.
        tensors: Shared tensors of these weights by name, before any update of a weight was folded.
        state: Server state for the next round; None if the algorithm keeps nothing.
        algorithm: Server algorithm.
        weighting: Weighting of the updates.
        method: Rule that combined them.
        accepted: Updates in the mean, sorted by client.
        rejected: Updates that were refused, sorted by path.
        rejected_bytes: Size of the refused files, received for nothing.
        dense_bytes: Size of as many updates of the dense model as were accepted, in float32.
        gap: Distance of the mean of the factors from that of the weights; None if no layer has factors that travel.
        refit: Gap before and after refitting; None if that was not asked for.
    """

    weights: Weights
    tensors: Mapping[str, NDArray[np.float32]]
    state: ServerState | None
    algorithm: ServerAlgorithm
    weighting: Weighting
    method: Method
    accepted: tuple[Accepted, ...]
    rejected: tuple[Rejected, ...]
    rejected_bytes: int
    dense_bytes: int
    gap: Gap | None
    refit: Refit | None

    @property
    def received_bytes(self) -> int:
        """Size of all accepted files."""
        return sum(update.bytes for update in self.accepted)

    @property
    def identities(self) -> list[Identity]:
        """The updates that were accepted, for a gate, which knows their digests."""
        base = self.weights.round - 1
        return [Identity(each.client, base - each.staleness, str(each.sha256)) for each in self.accepted]

    @property
    def listing(self) -> list[dict[str, Any]]:
        """Client, examples and digest of each accepted update, by digest, as a transcript has them."""
        listed = [
            {"client": update.client, "examples": update.examples, "sha256": update.sha256} for update in self.accepted
        ]
        return sorted(listed, key=lambda update: str(update["sha256"]))

    @property
    def share(self) -> float:
        """Received bytes over those of the dense model."""
        return self.received_bytes / self.dense_bytes

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, plain data for `json.dumps`."""
        return {
            "fingerprint": self.weights.fingerprint,
            "round": self.weights.round,
            "algorithm": self.algorithm.to_json(),
            "weighting": self.weighting,
            **self.method.to_json(),
            "examples": sum(update.examples for update in self.accepted),
            "accepted": [update.to_json() for update in self.accepted],
            "rejected": [update.to_json() for update in self.rejected],
            "received_bytes": self.received_bytes,
            "rejected_bytes": self.rejected_bytes,
            "dense_bytes": self.dense_bytes,
            "share": self.share,
            "gap": None if self.gap is None else self.gap.to_json(),
            "refit": None
            if self.refit is None
            else {"before": finite(self.refit.before), "after": finite(self.refit.after)},
        }
