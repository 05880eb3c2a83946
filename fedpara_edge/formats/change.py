"""The change file: the encoded change from the weights of one round to those of a later one.

Format `fedpara-edge/change`, version 1 (container: `storage.tensorfile`). Header:

    format, version
    fingerprint   hexadecimal; of the bundle
    round         of the new weights
    base          SHA-256 of the weights that it applies to (`weights`)
    result        SHA-256 of the new weights
    codec         {"name", "version", …}: how the change is stored (`codecs`), with the settings of that codec

and the arrays that the codec stores. The new weights are base + decoded, each entry one addition in float32, with the
updates folded whose period ends (`fedpara_edge.factors.update`): the same bits wherever the change is applied, which
`result` proves. These are *the* weights of the round: devices train from
them and updates refer to them, so the server goes on with them as well.

What a lossy codec leaves out is not lost: the server adds it to the next change (error feedback; Tang et al.,
DoubleSqueeze, arXiv 1905.05957), except for running statistics and the factors of updates (`statistics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import open_codec
from fedpara_edge.codecs.codec import Encoder, flatten, in_order, not_finite, unflatten
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.codecs.statistics import encode_change, left_out
from fedpara_edge.errors import DivergedError, InputError, InvalidUpdateError, WrongBundleError, brief, brief_text
from fedpara_edge.formats.tables import max_table_bytes
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

FORMAT = "fedpara-edge/change"
REMEDY = "fetch the change again"


@dataclass(frozen=True, kw_only=True)
class Published:
    """New weights as they were published, through a codec.

    Args:
        weights: Weights of the new round, as everyone who applies the change has them.
        residual: Part that the change leaves out, float32, by shared tensor; for the next call.
        bytes: Size of the file.
    """

    weights: Weights
    residual: dict[str, NDArray[np.float32]]
    bytes: int


def publish_change(
    path: Path | str,
    base: Weights,
    target: Weights,
    encoder: Encoder,
    *,
    residual: Mapping[str, NDArray[np.float32]] | None,
    overwrite: bool = True,
) -> Published:
    """Write the change from one round to the next, atomically.

        delta = target - base + residual,    weights = base + decoded,    residual' = delta - decoded

    Args:
        path: File to write.
        base: Weights of those who will apply the change.
        target: New weights, of a later round; with updates, before any of them is folded.
        encoder: Encoder from `codecs.find_encoder`, which rounds to the nearest here.
        residual: Residual of the previous call; None before the first.
        overwrite: Whether to replace an existing file that has other content.

    Raises:
        OutputExistsError: The file exists with other content, and `overwrite` is false.
        InputError: The weights are not of the same bundle, or `target` is not of a later round.
        DivergedError: The new weights would not be finite.
        FedparaError: The disk refuses the write.
    """
    path = Path(path)
    if target.fingerprint != base.fingerprint or target.round <= base.round:
        raise InputError(
            f"{path}: expected new weights of bundle {base.fingerprint[:12]}… after round {base.round}, found those of "
            f"bundle {target.fingerprint[:12]}… of round {target.round}; check the order of the weights"
        )
    tensors = in_order(base.layout.shared)
    old = flatten(tensors, base.tensors)
    with np.errstate(over="ignore", invalid="ignore"):
        delta = flatten(tensors, target.tensors) - old
        if residual is not None:
            delta += flatten(tensors, residual)
    if (bad := not_finite(unflatten(tensors, delta))) is not None:
        raise DivergedError(
            f"{path}: tensor {bad!r}: expected a finite change of the weights, found NaN or Inf; nothing was written: "
            "use weights that did not diverge"
        )
    encoded = encode_change(encoder, tensors, delta, seed=None)
    weights = _moved(base, old, encoded.decoded, target.round)
    if (bad := not_finite(weights.tensors)) is not None:
        raise DivergedError(
            f"{path}: tensor {bad!r}: expected finite weights after the change, found NaN or Inf; nothing was written: "
            "use weights that did not diverge"
        )
    header = {
        "format": FORMAT,
        "version": 1,
        "fingerprint": base.fingerprint,
        "round": target.round,
        "base": base.base,
        "result": weights.base,
        "codec": {"name": encoder.name, "version": encoder.version, **encoded.settings},
    }
    write_tensors(path, encoded.arrays, header, overwrite=overwrite)
    left = left_out(tensors, unflatten(tensors, delta), unflatten(tensors, encoded.decoded))
    return Published(weights=weights, residual=left, bytes=path.stat().st_size)


def apply_change(weights: Weights, path: Path | str) -> Weights:
    """New weights: given ones plus the change in a file.

    Args:
        weights: Weights to which the change applies.
        path: Change file.

    Raises:
        InvalidUpdateError: The file is missing, damaged or not ours, or does not lead to the weights that it states.
        WrongBundleError: The change applies to other weights.
        InputError: The codec needs a package that is missing.
    """
    path = Path(path)
    limit = max_table_bytes(weights.layout)
    with TensorFile(path, format=FORMAT, error=InvalidUpdateError, remedy=REMEDY, max_table_bytes=limit) as file:
        round_, result = _check_header(file.header, weights, path)
        tensors = in_order(weights.layout.shared)
        change = decode_all(open_codec(file, tensors), weights.layout.shared_parameters)
        file.check_unchanged()
    moved = _moved(weights, flatten(tensors, weights.tensors), change, round_)
    if (bad := not_finite(moved.tensors)) is not None:
        raise InvalidUpdateError(
            f"{path}: tensor {bad!r}: expected finite weights after the change, found NaN or Inf; {REMEDY}",
            code="not_finite",
        )
    if moved.base != result:
        raise InvalidUpdateError(
            f"{path}: result: expected {brief_text(result, max_length=12)}, found {moved.base[:12]}…: the change "
            f"was altered; {REMEDY}",
            code="result",
        )
    return moved


def read_change_base(path: Path) -> str:
    """SHA-256 of the weights that a change applies to, as its header states it.

    Raises:
        InvalidUpdateError: The file is missing, damaged or not ours.
    """
    with TensorFile(path, format=FORMAT, error=InvalidUpdateError, remedy=REMEDY) as file:
        return str(file.header.get("base"))


def _check_header(header: Mapping[str, Any], weights: Weights, path: Path) -> tuple[int, str]:
    found = {name: header.get(name) for name in ("fingerprint", "base", "result")}
    round_ = header.get("round")
    if not all(isinstance(value, str) for value in found.values()) or type(round_) is not int:
        raise InvalidUpdateError(
            f"{path}: expected fingerprint, base, result and round in its header, found "
            f"{brief(header, max_length=100)}; {REMEDY}",
            code="header",
        )
    for name, expected in (("fingerprint", weights.fingerprint), ("base", weights.base)):
        if found[name] != expected:
            raise WrongBundleError(
                f"{path}: {name}: expected {expected[:12]}…, of the weights of round {weights.round}, found "
                f"{brief_text(found[name], max_length=12)}; this change leads to round {brief(round_)}: apply "
                "every change since those weights, in the order of their rounds",
                code=f"wrong_{name}",
            )
    if not weights.round < round_ <= 1 << 40:
        raise InvalidUpdateError(
            f"{path}: round: expected one after {weights.round}, found {brief(round_)}; {REMEDY}", code="header"
        )
    return round_, str(found["result"])


def _moved(base: Weights, old: NDArray[np.float32], change: NDArray[np.float32], round_: int) -> Weights:
    """Weights after a flat change."""
    with np.errstate(over="ignore", invalid="ignore"):
        return base.moved(unflatten(in_order(base.layout.shared), old + change), round_)
