"""Partials: the sums of some updates of a round, made from update files, from other partials, or from both.

They may be made anywhere, in any order, and put together in any shape: the aggregation with `exact` makes of them the
weights that it makes of the updates, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.aggregation.contribution import Contribution
from fedpara_edge.aggregation.gate import Gate, HashingGate, Identity
from fedpara_edge.aggregation.gathering import gather
from fedpara_edge.aggregation.screening import Rejected
from fedpara_edge.aggregation.staleness import recent
from fedpara_edge.aggregation.verdicts import too_few
from fedpara_edge.errors import InputError
from fedpara_edge.formats.partial import write_partial
from fedpara_edge.formats.serverstate import read_state_for
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.storage.atomic import Ready, check_output

EXACT = AggregateConfig(exact=True)


@dataclass(frozen=True, kw_only=True)
class MadePartial:
    """A partial that was written.

    Args:
        output: File of the partial.
        bytes: Size of the file.
        digest: Digest that it states of itself.
        round: Round of the weights that it is for.
        contributions: Updates in it, sorted by client.
        rejected: Updates and partials that were refused, sorted by path.
    """

    output: Path
    bytes: int
    digest: str
    round: int
    contributions: tuple[Contribution, ...]
    rejected: tuple[Rejected, ...]

    @property
    def examples(self) -> int:
        """Number of examples of all updates in it."""
        return sum(each.header.examples for each in self.contributions)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {
            "output": str(self.output),
            "partial_bytes": self.bytes,
            "digest": self.digest,
            "round": self.round,
            "examples": self.examples,
            "received_bytes": sum(each.bytes for each in self.contributions),
            "clients": [each.header.client for each in self.contributions],
            "rejected": [each.to_json() for each in self.rejected],
        }


def make_partial(
    updates: Iterable[Path | str],
    weights: Path | str,
    output: Path | str,
    config: AggregateConfig = EXACT,
    *,
    state: Path | str | None = None,
    gate: Gate | None = None,
    seal: Ready | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> MadePartial:
    """Sum updates and partials of a round into one partial.

    The same files give the same bytes, so that one which was killed is completed by doing it again.

    Args:
        updates: Update files and partials, in any order.
        weights: Weights file that the updates were trained from.
        output: Partial to write.
        config: Algorithm, weighting and clipping, as in the aggregation to come, and when to stop; with `exact`.
        state: Folder with the server state of the round, which knows the rounds before; needed for late updates, with
            `config.max_staleness`.
        gate: Judge of whose each update is; None to believe the names in the files.
        seal: Function that signs the complete partial before it appears as `output`; None for none.
        overwrite: Whether to replace a file that exists with other content.
        on_progress: Function that is called with the number of update files read and of all to read.

    Raises:
        OutputExistsError: A file exists, and is not what would be written.
        InputError: A file can't be written, the weights are missing, or a partial is not enough and an update file is
            missing.
        TooFewUpdatesError: There are fewer valid updates than asked for; its `rejected` tells of the others.
        InvalidUpdateError, TrustError, WrongBundleError: Files contradict each other, or one is bad, with
            `config.strict`.
        FedparaError: The disk refuses the write.
    """
    gate = gate or HashingGate()
    output, base, files = Path(output), read_weights(Path(weights)), tuple(map(Path, updates))
    check_output(output, overwrite=True, inputs=(Path(weights), *files))
    if config.max_staleness and state is None:
        raise InputError("expected the folder that knows the rounds before, found none; give one", key="state")
    if state is not None and not Path(state).is_dir():
        raise InputError(f"expected a state folder, found none at {state}; check the path", key="state")
    kept = read_state_for(Path(state), base) if config.max_staleness and state is not None else None
    gathered = gather(
        files,
        base,
        config.server_algorithm,
        weighting=config.effective_weighting,
        mechanism=config.mechanism,
        gate=gate,
        history=recent(kept, base, config.max_staleness),
        on_progress=on_progress,
    )
    rejected = sorted(gathered.rejected, key=lambda each: str(each.path))
    if config.strict and rejected:
        raise rejected[0].error
    if len(gathered.contributions) < config.min_updates:
        raise too_few(config.min_updates, len(gathered.contributions), rejected)
    partial = gathered.to_partial()
    gate.record([Identity(*each.header.sender, str(each.sha256)) for each in gathered.contributions], base)
    digest = write_partial(output, partial, overwrite=overwrite, seal=seal)
    return MadePartial(
        output=output,
        bytes=output.stat().st_size,
        digest=digest,
        round=base.round,
        contributions=tuple(gathered.contributions),
        rejected=tuple(rejected),
    )
