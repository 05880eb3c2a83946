"""Screening of update files: which ones go into the mean, as far as their headers tell, and why the others do not.

The verdicts don't depend on the order of the files. Of one client only one update counts: files with the same content
count once, and where the contents differ all of them are refused, as nothing tells the right one. Only updates that are
good in themselves can conflict, values included, so that a bad one under a client's name does not push its own out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.aggregation.gate import Gate
from fedpara_edge.aggregation.staleness import discounted
from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.errors import BudgetError, FedparaError, InvalidUpdateError, TrustError, WrongBundleError, detached
from fedpara_edge.formats.encoded import read_change
from fedpara_edge.formats.history import NO_HISTORY, History
from fedpara_edge.formats.update import Update, is_valid_client_name, open_update_file
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.tensorfile import TensorFile


@dataclass(frozen=True)
class Rejected:
    """An update that was refused.

    Args:
        path: Update file.
        client: Name of the client as the file states it; None if that can't be read.
        error: Reason; `fedpara_edge.errors` lists the codes. It is kept for as long as the round lasts, and so it is
            detached.
    """

    path: Path
    client: str | None
    error: FedparaError

    def __post_init__(self) -> None:
        detached(self.error)

    @property
    def code(self) -> str:
        """Reason in one word."""
        return self.error.code

    @property
    def reason(self) -> str:
        """Reason in one line."""
        return str(self.error)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {"path": str(self.path), "client": self.client, "code": self.code, "reason": self.reason}


def screen(
    paths: Iterable[Path],
    weights: Weights,
    algorithm: ServerAlgorithm,
    gate: Gate | None = None,
    *,
    history: History = NO_HISTORY,
) -> tuple[list[Update], list[Rejected]]:
    """Compare all files with the weights they should change, except for their values.

    Args:
        paths: Update files, in any order.
        weights: Weights that they must have been trained from.
        algorithm: Algorithm that they must have been trained for, as far as their metrics tell.
        gate: Judge of whose each is; None to believe the names in the files.
        history: Past rounds of which updates may count as well.

    Returns:
        The updates to take, closed, discounted if late (`staleness`), sorted by client, and the rejected ones.
    """
    opened, rejected = open_updates(paths, weights, algorithm, gate, history=history)
    admitted, others = one_of_each(opened, weights)
    return admitted, [*rejected, *others]


def open_updates(
    paths: Iterable[Path],
    weights: Weights,
    algorithm: ServerAlgorithm,
    gate: Gate | None = None,
    *,
    history: History = NO_HISTORY,
) -> tuple[list[Update], list[Rejected]]:
    """The updates that are good in themselves but for their values, closed, and the rejected ones (`screen`)."""
    found = _open_all(sorted(paths, key=str), weights, algorithm, gate, history)
    updates = [each for each in found if isinstance(each, Update)]
    return updates, [each for each in found if isinstance(each, Rejected)]


def one_of_each(updates: Iterable[Update], weights: Weights) -> tuple[list[Update], list[Rejected]]:
    """One update of each client and round, sorted by these, and the others; none where several differ."""
    by_sender: dict[tuple[str, int], list[Update]] = {}
    for update in updates:
        by_sender.setdefault(update.header.sender, []).append(update)
    admitted, rejected = [], []
    for sender in sorted(by_sender):
        one, others = _one_of(by_sender[sender], weights)
        admitted += one
        rejected += others
    return admitted, rejected


def _open_all(
    paths: Sequence[Path], weights: Weights, algorithm: ServerAlgorithm, gate: Gate | None, history: History
) -> list[Update | Rejected]:
    """What `_open` makes of each: on all cores if there is a gate, as signatures take longer to verify than headers."""
    if gate is None:
        return [_open(path, weights, algorithm, None, history) for path in paths]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda path: _open(path, weights, algorithm, gate, history), paths))


def _open(
    path: Path, weights: Weights, algorithm: ServerAlgorithm, gate: Gate | None, history: History
) -> Update | Rejected:
    """The update in a file, closed again, or why it is refused."""
    client = None
    try:
        file = open_update_file(path, weights)
        client = _stated_client(file)
        if gate is not None:
            _pass(gate, file, weights)
        update = Update(file, weights, history)
        update.close()
        _check_metrics(update, algorithm)
    except (BudgetError, InvalidUpdateError, TrustError, WrongBundleError) as error:
        return Rejected(path, client, error)
    return discounted(update, weights)


def _pass(gate: Gate, file: TensorFile, weights: Weights) -> None:
    try:
        gate.check(file, weights)
    except BaseException:
        file.close()
        raise


def _check_metrics(update: Update, algorithm: ServerAlgorithm) -> None:
    try:
        algorithm.check_metrics(update.header.metrics)
    except InvalidUpdateError as error:
        raise InvalidUpdateError(f"{update.path}: {error}", code=error.code) from error


def _one_of(updates: Sequence[Update], weights: Weights) -> tuple[list[Update], list[Rejected]]:
    if len(updates) == 1:
        return list(updates), []
    readable, rejected = read_whole(updates, weights)
    if len({digest for digest, _ in readable}) > 1:
        rejected += [conflicting(update) for _, update in readable]
        return [], rejected
    for _, update in readable[1:]:
        message = f"expected one update of each client, found the content of {readable[0][1].path} again"
        rejected.append(_reject(update, f"{update.path}: client {update.header.client!r}: {message}", "duplicate"))
    return [update for _, update in readable[:1]], rejected


def read_whole(updates: Iterable[Update], weights: Weights) -> tuple[list[tuple[str, Update]], list[Rejected]]:
    """Updates whose values are good too, each with the digest of its file, and the rejected ones."""
    readable: list[tuple[str, Update]] = []
    rejected = []
    tensors = in_order(weights.layout.shared)
    for update in updates:
        try:
            update.reopen()
            with update.file:
                try:
                    read_change(update.file, tensors)
                except InvalidUpdateError:
                    update.file.check_read()  # what was forged is called so, whatever else is wrong
                    raise
                readable.append((update.file.sha256(), update))
        except (InvalidUpdateError, TrustError) as error:
            rejected.append(Rejected(update.path, update.header.client, error))
    return readable, rejected


def conflicting(update: Update) -> Rejected:
    """The refusal of an update beside another of its client."""
    message = "expected one update of each client, found several with different content; send the right one"
    return _reject(update, f"{update.path}: client {update.header.client!r}: {message}", "conflict")


def _reject(update: Update, message: str, code: str) -> Rejected:
    return Rejected(update.path, update.header.client, InvalidUpdateError(message, code=code))


def _stated_client(file: TensorFile) -> str | None:
    client = file.header.get("client")
    return client if isinstance(client, str) and is_valid_client_name(client) else None
