"""Updates and partials of a round in one exact sum, in which each update counts once.

Where an update comes in several files is settled by its digest, as it is for updates alone (`screening`):

- A partial all of whose updates are in another one is left out, such as a part of one that was merged.
- Of an update that is in several sums, all but one are taken away again.
- Of a client with several different updates none counts; all are taken away, and the partial remembers it, so that one
  that comes with a further partial does not count either.

Taking away needs the update file beside the partials. So the result does not depend on the shape of the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpara_edge.aggregation.averaging import contributions_of
from fedpara_edge.aggregation.contribution import Contribution
from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.aggregation.finishing import remove
from fedpara_edge.aggregation.gate import Gate
from fedpara_edge.aggregation.screening import Rejected, conflicting, one_of_each, open_updates, read_whole
from fedpara_edge.aggregation.sums import ModelSums, own_weights
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.errors import FedparaError, InvalidUpdateError, TrustError, WrongBundleError
from fedpara_edge.formats.history import NO_HISTORY, History
from fedpara_edge.formats.partial import FORMAT, Conflicts, Counted, Partial, PartialFile, PartialHeader
from fedpara_edge.formats.tables import max_table_bytes
from fedpara_edge.formats.update import Update, check_base
from fedpara_edge.formats.weights import Weights
from fedpara_edge.privacy.mechanism import Gaussian, check_layout
from fedpara_edge.storage.tensorfile import TensorFile

Sender = tuple[str, int]
"""Client and round of an update."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Updates of a round in exact sums.

    Args:
        header: Weights, algorithm and weighting that the sums are for.
        contributions: Updates in the sums, sorted by client and round.
        conflicts: Digests of the updates of which several were found, by client and round.
        sums: Exact sums.
        rejected: Updates and partials that were refused.
    """

    header: PartialHeader
    contributions: Sequence[Contribution]
    conflicts: Conflicts
    sums: ModelSums
    rejected: Sequence[Rejected]

    def to_partial(self) -> Partial:
        """Content of the partial to write."""
        counted = [
            Counted(header=each.header, sha256=str(each.sha256), bytes=each.bytes, norms=each.norms)
            for each in self.contributions
        ]
        sums = {name: part.digits() for name, part in self.sums.parts().items()}
        return Partial(header=self.header, counted=counted, conflicts=self.conflicts, sums=sums)


def gather(
    paths: Iterable[Path],
    weights: Weights,
    algorithm: ServerAlgorithm,
    *,
    weighting: Weighting,
    mechanism: Gaussian | None = None,
    gate: Gate | None = None,
    history: History = NO_HISTORY,
    on_progress: Callable[[int, int], None] | None = None,
    effort: Effort = USUAL,
) -> Gathered:
    """Sum updates and partials.

    With a mechanism no partial is left out but for those whose updates are in another: as one client could have that
    done to it, the others in it would be missed in the sum, which is more than noise for one client hides.

    Args:
        paths: Update files and partials, in any order.
        weights: Weights that they change.
        algorithm: Server algorithm, which says what means it needs.
        weighting: Weighting of the updates.
        mechanism: Mechanism for which changes are clipped before they are added; None to add them as they are.
        gate: Judge of whose each update is; None to believe the names in the files.
        history: Past rounds of which updates may count as well.
        on_progress: Function that is called with the number of update files read and of all.
        effort: Division of the work.

    Raises:
        InputError: An update counts twice, or is one of several of its client, and its file is not there.
        InvalidUpdateError: Two partials contradict each other, or an update file contradicts a partial.
        InvalidUpdateError, TrustError, WrongBundleError: A partial is refused, with a mechanism.
    """
    if mechanism is not None:
        check_layout(weights.layout)
    header = PartialHeader(
        fingerprint=weights.fingerprint,
        round=weights.round,
        base=weights.base,
        algorithm=algorithm.name,
        weighting=weighting,
        privacy=None if mechanism is None else mechanism.grid,
    )
    files, found = list(map(Path, paths)), dict[bool, list[Path]]()
    for path in sorted(set(files), key=str):
        found.setdefault(_is_partial(path, weights), []).append(path)
    partials, rejected = _open_partials(found.get(True, []), weights, algorithm, header, gate, history)
    updates, refused = open_updates(found.get(False, []), weights, algorithm, gate, history=history)
    shared = {sender for partial in partials for sender in (*partial.conflicts, *_senders(partial))}
    admitted, others = one_of_each([each for each in updates if each.header.sender not in shared], weights)
    conflicts = _conflicts_of(others, updates)
    beside, unreadable = read_whole([each for each in updates if each.header.sender in shared], weights)
    rejected += [*refused, *others, *unreadable]
    sums, contributions, bad = _sum(admitted, weights, algorithm, weighting, mechanism, on_progress, effort)
    rejected += bad
    for partial in partials:
        for name, part in sums.parts().items():
            for level, digits in partial.digits(name):
                part.add_digits(level, digits)
    kept, surplus, contradicting = _settle(partials, beside)
    rejected += [conflicting(update) for _, update in beside if update.header.sender in contradicting]
    for reason, several in surplus.items():
        remove(several, sums, algorithm, weighting, reason=reason, effort=effort)
    return Gathered(
        header=header,
        contributions=sorted((*contributions, *kept), key=lambda each: each.header.sender),
        conflicts={**conflicts, **contradicting},
        sums=sums,
        rejected=rejected,
    )


def _is_partial(path: Path, weights: Weights) -> bool:
    limit = max_table_bytes(weights.layout)
    try:
        with TensorFile(path, format=None, error=FedparaError, max_table_bytes=limit) as file:
            return bool(file.header["format"] == FORMAT)
    except FedparaError:
        return False


def _open_partials(
    paths: Iterable[Path],
    weights: Weights,
    algorithm: ServerAlgorithm,
    header: PartialHeader,
    gate: Gate | None,
    history: History,
) -> tuple[list[PartialFile], list[Rejected]]:
    """The partials that fit and are not in others, and the refused ones."""
    entries = {name: part.entries for name, part in ModelSums(weights.layout, algorithm).parts().items()}
    opened, rejected = list[PartialFile](), list[Rejected]()
    for path in paths:
        try:
            partial = PartialFile(path, weights, header, entries)
            if gate is not None:
                gate.check_partial(partial, weights)
            for counted in partial.counted:
                check_base(counted.header, weights, history, path=path)
                algorithm.check_metrics(counted.header.metrics)
        except (InvalidUpdateError, TrustError, WrongBundleError) as error:
            if header.privacy is not None:
                raise
            rejected.append(Rejected(path, None, error))
        else:
            opened.append(partial)
    taken: list[PartialFile] = []
    for partial in sorted(opened, key=lambda each: (-len(each.counted), str(each.path))):
        holder = next((other for other in taken if _holds(other, partial)), None)
        if holder is None:
            taken.append(partial)
        else:
            message = (
                f"{partial.path}: expected an update that is in no other partial, found all of them in {holder.path}"
            )
            rejected.append(Rejected(partial.path, None, InvalidUpdateError(message, code="duplicate")))
    return taken, rejected


def _holds(whole: PartialFile, part: PartialFile) -> bool:
    """Whether everything in a partial is in another.

    Raises:
        InvalidUpdateError: They have the same updates and differ.
    """
    updates = {each.sha256 for each in whole.counted}
    if not all(each.sha256 in updates for each in part.counted):
        return False
    if not all(set(digests) <= set(whole.conflicts.get(sender, ())) for sender, digests in part.conflicts.items()):
        return False
    if len(part.counted) == len(updates) and part.conflicts == whole.conflicts and part.digest != whole.digest:
        raise InvalidUpdateError(
            f"{part.path}: expected the sum of the same updates as in {whole.path}, found another one; make both again",
            code="partial",
        )
    return True


def _senders(partial: PartialFile) -> list[Sender]:
    return [each.header.sender for each in partial.counted]


def _conflicts_of(rejected: Iterable[Rejected], updates: Sequence[Update]) -> dict[Sender, list[str]]:
    by_path, found = {update.path: update for update in updates}, dict[Sender, list[str]]()
    for each in rejected:
        if each.code == "conflict":
            update = by_path[each.path]
            digest = update.file.known_sha256
            assert digest is not None  # it was read whole, as every one of several of a client is
            found.setdefault(update.header.sender, []).append(digest)
    return {sender: sorted(digests) for sender, digests in found.items()}


def _sum(
    updates: Sequence[Update],
    weights: Weights,
    algorithm: ServerAlgorithm,
    weighting: Weighting,
    mechanism: Gaussian | None,
    on_progress: Callable[[int, int], None] | None,
    effort: Effort,
) -> tuple[ModelSums, list[Contribution], list[Rejected]]:
    """Exact sums of those updates that are good, facts about these, and the others."""
    rejected: list[Rejected] = []
    while True:
        sums = ModelSums(weights.layout, algorithm, mechanism)
        meter = sums.meter(len(updates))
        own = own_weights([update.header for update in updates], algorithm, weighting)
        refused = sums.add(updates, own, meter=meter, on_progress=on_progress, effort=effort)
        if not refused:
            return sums, contributions_of(updates, meter), rejected
        rejected += [Rejected(updates[k].path, updates[k].header.client, error) for k, error in refused.items()]
        updates = [update for k, update in enumerate(updates) if k not in refused]


def _settle(
    partials: Sequence[PartialFile], beside: Sequence[tuple[str, Update]]
) -> tuple[list[Contribution], dict[str, list[Contribution]], dict[Sender, list[str]]]:
    """Updates in partials that count, those to take away by reason, and the digests where a client sent several.

    Args:
        partials: The partials.
        beside: Updates of the same clients and rounds that came as files, by their digests.
    """
    files, found, digests = dict(beside), dict[Sender, list[Contribution]](), dict[Sender, set[str]]()
    for digest, update in beside:
        digests.setdefault(update.header.sender, set()).add(digest)
    for partial in partials:
        for sender, several in partial.conflicts.items():
            digests.setdefault(sender, set()).update(several)
        for counted in partial.counted:
            file = files.get(counted.sha256)
            if file is not None and file.header != counted.header:
                raise _contradiction(partial.path, counted, file.path)
            sender = counted.header.sender
            found.setdefault(sender, []).append(Contribution(**vars(counted), path=partial.path, update=file))
            digests.setdefault(sender, set()).add(counted.sha256)
    in_conflict = {sender for sender, several in digests.items() if len(several) > 1}
    in_conflict.update(sender for partial in partials for sender in partial.conflicts)
    kept, surplus = list[Contribution](), dict[str, list[Contribution]]()
    for sender, (first, *others) in found.items():
        if sender in in_conflict:
            surplus.setdefault("their clients sent several with different content", []).extend((first, *others))
            continue
        kept.append(first)
        for each in others:
            if replace(each, path=first.path) != first:
                raise _contradiction(each.path, each, first.path)
            surplus.setdefault("they are in several of them", []).append(each)
    return kept, surplus, {sender: sorted(digests[sender]) for sender in in_conflict}


def _contradiction(path: Path, counted: Counted | Contribution, other: Path) -> InvalidUpdateError:
    return InvalidUpdateError(
        f"{path}: client {counted.header.client!r}: expected what {other} says of its update, found something else; "
        "make the partial again",
        code="partial",
    )
