"""The weights file: all shared tensors of a model after a round.

Format `fedpara-edge/weights`, version 1 (container: `storage.tensorfile`). Header:

    format, version
    fingerprint   hexadecimal; of the bundle
    round         number of rounds of aggregation behind the weights; 0 for the initial weights
    layout        layers and tensors (`Layout.to_json`), so that the file explains itself
    codec         {"name", "version", …}: how the weights are stored (`codecs`, `formats.drawn`), with the settings of
                  that codec; left out for `float32`
    digest        as in `storage.digest`, with the base for the digest of the content

and the arrays that the codec stores: without one, a float32 tensor for every tensor of role `shared`, `base` or
`velocity`, under its own name and shape, but for those of updates that are zero: factors at the start of a period, and
velocities before the first fold (`fedpara_edge.factors.update`). The weights are what is decoded, for everybody alike.

The *base* to which updates refer is a SHA-256 of the content, so that weights rebuilt elsewhere have it too: of the
UTF-8 text "<fingerprint> <round>\\n", then, by name, of each tensor's name in UTF-8, a zero byte, and its values in C
order as little-endian float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import open_codec
from fedpara_edge.codecs.codec import Encoder, flatten, in_order, not_finite, unflatten
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.codecs.float32 import Float32
from fedpara_edge.codecs.statistics import encode_change
from fedpara_edge.errors import FedparaError, InputError, InvalidUpdateError, WrongBundleError, brief, brief_text
from fedpara_edge.factors.layout import Layout, TensorSpec
from fedpara_edge.factors.update import check_updates, drawn_tensors, folded, stored_tensors, weight_tensors
from fedpara_edge.formats import drawn
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.tables import max_table_bytes
from fedpara_edge.storage.digest import FIELD, check_digest, with_digest
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors
from fedpara_edge.storage.tensortable import MAX_TABLE_BYTES

FORMAT = "fedpara-edge/weights"
MAX_ROUND = 1 << 40
MAX_ENTRIES_PER_BYTE = 256
"""Bound on what a weights file decodes to: it brings its own layout, so nothing else limits a small one."""
_UNSTATED = {"name": Float32.name, "version": Float32.version}
_FURTHER = {(drawn.NAME, drawn.VERSION): drawn.open_drawn}
REMEDY = "use weights written by export or aggregate"
"""Remedy for a file without usable weights."""


@dataclass(frozen=True)
class Weights:
    """Content of a weights file.

    Args:
        fingerprint: Fingerprint of the bundle.
        round: Number of rounds behind these weights.
        layout: Layers and tensors of the model.
        tensors: Shared tensors, and bases and velocities of updates, by name, float32.
    """

    fingerprint: str
    round: int
    layout: Layout
    tensors: Mapping[str, NDArray[np.float32]]

    @cached_property
    def base(self) -> str:
        """Hexadecimal SHA-256 of the content, as the module describes it."""
        content = hashlib.sha256(f"{self.fingerprint} {self.round}\n".encode())
        for name in sorted(self.tensors):
            content.update(name.encode() + b"\0")
            content.update(np.ascontiguousarray(self.tensors[name], "<f4").data)
        return content.hexdigest()

    @cached_property
    def flat(self) -> Sequence[TensorSpec]:
        """Shared tensors in the order of a flat change (`codecs.codec`)."""
        return in_order(self.layout.shared)

    @property
    def whole(self) -> dict[str, NDArray[np.float32]]:
        """All that the model is composed of besides personal tensors: with what is drawn, without velocities."""
        unused = {tensor.name for tensor in self.layout.with_role("velocity")}
        composing = {name: values for name, values in self.tensors.items() if name not in unused}
        return {**composing, **drawn_tensors(self.layout, self.fingerprint, self.round)}

    def refuse_keeping(self, algorithm: str, kept: Sequence[str]) -> None:
        """Refuse an algorithm that keeps something for each shared tensor, for a model with updates.

        Args:
            algorithm: Name of the algorithm.
            kept: Names of what it keeps.

        Raises:
            InputError: It keeps something, which would be in directions of updates that are gone.
        """
        if kept and self.layout.held:
            raise InputError(
                f"expected one that keeps nothing from round to round for a model of kind update, whose factors have "
                f"other directions each time, such as fedavg, fedavgm or fedprox, found {algorithm}",
                key="algorithm",
            )

    def moved(self, tensors: Mapping[str, NDArray[np.float32]], round: int) -> Weights:
        """Weights of a later round, with the updates folded whose period ends with it.

        Args:
            tensors: New shared tensors by name; others stay as they are.
            round: Number of that round, in the same period or at its end.
        """
        new = folded(self.layout, {**self.tensors, **tensors}, self.fingerprint, round)
        return Weights(self.fingerprint, round, self.layout, new)


def write_weights(
    path: Path | str, weights: Weights, encoder: Encoder | None = None, *, overwrite: bool = True
) -> Weights:
    """Write a weights file, atomically.

    Args:
        path: File to write.
        weights: Weights to store.
        encoder: Encoder from `codecs.find_encoder`, which rounds to the nearest here; None for float32, which is exact.
        overwrite: Whether to replace an existing file that has other content.

    Returns:
        Weights as the file has them.

    Raises:
        OutputExistsError: The file exists with other content, and `overwrite` is false.
        FedparaError: A value is not finite or too large for the codec, or the disk refuses the write.
    """
    path = Path(path)
    tensors = in_order(stored_tensors(weights.layout, weights.round))
    if (bad := not_finite(weights.tensors)) is not None:
        raise FedparaError(
            f"{path}: tensor {bad!r}: expected finite weights, found NaN or Inf; nothing was written: use weights that "
            "did not diverge"
        )
    encoded = encode_change(encoder or Float32(), tensors, flatten(tensors, weights.tensors), seed=None)
    header = {
        "format": FORMAT,
        "version": 1,
        "fingerprint": weights.fingerprint,
        "round": weights.round,
        "layout": weights.layout.to_json(),
    }
    if encoder is not None and encoder.name != Float32.name:
        header["codec"] = {"name": encoder.name, "version": encoder.version, **encoded.settings}
    written = replace(weights, tensors={**weights.tensors, **unflatten(tensors, encoded.decoded)})
    write_tensors(path, encoded.arrays, with_digest(header, written.base), overwrite=overwrite)
    return written


def read_weights(path: Path | str, bundle: Bundle | None = None) -> Weights:
    """Read and verify a weights file.

    Args:
        path: Weights file.
        bundle: Bundle that the weights must belong to, which bounds what is read; None for any.

    Raises:
        WrongBundleError: The file is damaged or of another format, belongs to another bundle, its tensors do not fit
            its own layout, or a value is not finite.
        InputError: The file is missing, or its codec needs a package that is.
    """
    path = Path(path)
    limit = MAX_TABLE_BYTES if bundle is None else max_table_bytes(bundle.manifest.layout)
    with TensorFile(path, format=FORMAT, error=WrongBundleError, remedy=REMEDY, max_table_bytes=limit) as file:
        try:
            layout = Layout.from_json(file.header["layout"])
            check_updates(layout)
            fingerprint, number = _identity(file.header)
        except (InputError, KeyError) as error:
            fault = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise WrongBundleError(
                f"{path}: expected the header of a weights file, found {brief_text(fault, max_length=200)}; {REMEDY}"
            ) from error
        if bundle is not None:
            _check_bundle(path, fingerprint, layout, bundle)
        tensors = in_order(stored_tensors(layout, number))
        entries = sum(tensor.size for tensor in tensors)
        if _is_drawn(file.header) and bundle is None and entries > drawn.MAX_ENTRIES:
            raise WrongBundleError(
                f"{path}: expected at most {drawn.MAX_ENTRIES} entries to draw, found {entries}; {REMEDY}"
            )
        if not _is_drawn(file.header) and entries > MAX_ENTRIES_PER_BYTE * file.size_bytes:
            raise WrongBundleError(
                f"{path}: expected at most {MAX_ENTRIES_PER_BYTE} entries for each of its {file.size_bytes} bytes, "
                f"found {entries}; {REMEDY}"
            )
        try:
            values = unflatten(
                tensors, decode_all(open_codec(file, tensors, unstated=_UNSTATED, further=_FURTHER), entries)
            )
        except InvalidUpdateError as error:
            raise WrongBundleError(str(error)) from error
    stored = {tensor.name for tensor in tensors}
    zeros = {t.name: np.zeros(t.shape, np.float32) for t in weight_tensors(layout) if t.name not in stored}
    weights = Weights(fingerprint, number, layout, {**values, **zeros})
    if FIELD in file.header:
        check_digest(file, weights.base)
    if (bad := not_finite(values)) is not None:
        raise WrongBundleError(
            f"{path}: tensor {brief(bad)}: expected finite weights, found NaN or Inf; use those of another round"
        )
    return weights


def _is_drawn(header: Mapping[str, Any]) -> bool:
    codec = header.get("codec")
    return isinstance(codec, dict) and codec.get("name") == drawn.NAME


def _check_bundle(path: Path, fingerprint: str, layout: Layout, bundle: Bundle) -> None:
    expected = bundle.manifest.fingerprint
    if fingerprint != expected or weight_tensors(layout) != weight_tensors(bundle.manifest.layout):
        raise WrongBundleError(
            f"{path}: expected weights of bundle {expected[:12]}…, found those of "
            f"{brief_text(fingerprint, max_length=12)}; use weights that were exported or aggregated with {bundle.path}"
        )


def _identity(header: Mapping[str, Any]) -> tuple[str, int]:
    fingerprint, number = header["fingerprint"], header["round"]
    if not isinstance(fingerprint, str) or not fingerprint.isprintable():
        raise InputError(f"fingerprint {brief(fingerprint)}")
    if type(number) is not int or not 0 <= number <= MAX_ROUND:
        raise InputError(f"round {brief(number)} where a number from 0 to {MAX_ROUND} is expected")
    return fingerprint, number
