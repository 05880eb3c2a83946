"""The change file: the way from the weights of one round to those of a later one, encoded.

Format `fedpara-edge/change`, version 1 (container: `storage.tensorfile`). Header:

    format, version
    fingerprint   hexadecimal; of the bundle
    round         of the weights after it
    base          SHA-256 of the weights it applies to (`weights`)
    result        SHA-256 of the weights after it
    codec         {"name", "version", …}: how the change is stored (`codecs`), with the settings of that codec

and the arrays the codec stores. The weights after it are base + decoded, each entry one addition of float32: the same
bits wherever it is applied, which `result` proves. These are *the* weights of the round: devices train from them and
updates refer to them, so the server goes on with them as well.

What a lossy codec leaves out is not lost: the server adds it to the next change (error feedback; Tang et al.,
DoubleSqueeze, arXiv 1905.05957).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import open_codec
from fedpara_edge.codecs.codec import Encoder, flatten, in_order, name_at, unflatten
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.errors import DivergedError, InputError, InvalidUpdateError, WrongBundleError, brief, brief_text
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

FORMAT = "fedpara-edge/change"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What became of new weights on their way through a codec.

    Args:
        weights: of the new round, as all who apply the change have them.
        residual: what the change left out, float32, by shared tensor; for the next call.
        bytes: size of the file.
    """

    weights: Weights
    residual: dict[str, NDArray[np.float32]]
    bytes: int


def publish(
    path: Path,
    base: Weights,
    target: Weights,
    encoder: Encoder,
    *,
    residual: Mapping[str, NDArray[np.float32]] | None,
) -> Published:
    """Write the change from one round to the next, atomically.

        delta = target - base + residual,    weights = base + decoded,    residual' = delta - decoded

    Args:
        path: the file to write.
        base: the weights that those who will apply it have.
        target: the new weights, of a later round.
        encoder: from `codecs.find_encoder`; it rounds to the nearest.
        residual: of the last call; None before the first.

    Raises:
        InputError: the two are not rounds of one model, or the codec needs a package that is missing.
        DivergedError: the new weights would not be finite.
        FedparaError: the disk refuses the write.
    """
    if target.fingerprint != base.fingerprint or target.round <= base.round:
        raise InputError(
            f"{path}: expected weights of {base.fingerprint[:12]}… after round {base.round}, found those of "
            f"{target.fingerprint[:12]}… of round {target.round}"
        )
    tensors = in_order(base.layout.shared)
    old = flatten(tensors, base.tensors)
    with np.errstate(over="ignore", invalid="ignore"):
        delta = flatten(tensors, target.tensors) - old
        if residual is not None:
            delta += flatten(tensors, residual)
    bad = np.flatnonzero(~np.isfinite(delta))
    if bad.size:
        raise DivergedError(
            f"{path}: tensor {name_at(tensors, int(bad[0]))!r}: expected a finite change of the weights, found NaN or "
            "Inf; nothing was written"
        )
    encoded = encoder.encode(tensors, delta, seed=None)
    try:
        weights = _moved(base, old, encoded.decoded, target.round, path)
    except InvalidUpdateError as error:
        raise DivergedError(f"{path}: expected a change after which the weights are finite: {error}") from error
    header = {
        "format": FORMAT,
        "version": 1,
        "fingerprint": base.fingerprint,
        "round": target.round,
        "base": base.base,
        "result": weights.base,
        "codec": {"name": encoder.name, "version": encoder.version, **encoded.settings},
    }
    write_tensors(path, encoded.arrays, header)
    left = unflatten(tensors, delta - encoded.decoded)
    return Published(weights=weights, residual=left, bytes=path.stat().st_size)


def apply_change(weights: Weights, path: Path) -> Weights:
    """The weights after a change.

    Args:
        weights: those it applies to.
        path: the change file.

    Raises:
        InvalidUpdateError: the file is missing, damaged or not ours, or does not lead to the weights it should.
        WrongBundleError: it applies to other weights.
        InputError: its codec needs a package that is missing.
    """
    with TensorFile(path, format=FORMAT, error=InvalidUpdateError) as file:
        round_, result = _check_header(file.header, weights, path)
        tensors = in_order(weights.layout.shared)
        change = decode_all(open_codec(file, tensors), weights.layout.shared_parameters)
        file.check_unchanged()
    moved = _moved(weights, flatten(tensors, weights.tensors), change, round_, path)
    if moved.base != result:
        raise InvalidUpdateError(
            f"{path}: result: expected {brief_text(result, most=12)}, found {moved.base[:12]}…: the change was "
            "altered; send it again",
            code="result",
        )
    return moved


def _check_header(header: Mapping[str, Any], weights: Weights, path: Path) -> tuple[int, str]:
    found = {name: header.get(name) for name in ("fingerprint", "base", "result")}
    round_ = header.get("round")
    if not all(isinstance(value, str) for value in found.values()) or type(round_) is not int:
        raise InvalidUpdateError(
            f"{path}: expected fingerprint, base, result and round in its header, found {brief(header, most=100)}; "
            "send it again",
            code="header",
        )
    for name, expected in (("fingerprint", weights.fingerprint), ("base", weights.base)):
        if found[name] != expected:
            raise WrongBundleError(
                f"{path}: {name}: expected {expected[:12]}…, of the weights of round {weights.round}, found "
                f"{brief_text(found[name], most=12)}; this change leads to round {brief(round_)}: apply every change "
                "since those weights, in the order of their rounds",
                code=f"wrong_{name}",
            )
    if not weights.round < round_ <= 1 << 40:
        raise InvalidUpdateError(
            f"{path}: round: expected one after {weights.round}, found {brief(round_)}; send it again", code="header"
        )
    return round_, str(found["result"])


def _moved(base: Weights, old: NDArray[np.float32], change: NDArray[np.float32], round_: int, path: Path) -> Weights:
    tensors = in_order(base.layout.shared)
    with np.errstate(over="ignore", invalid="ignore"):
        new = old + change
    bad = np.flatnonzero(~np.isfinite(new))
    if bad.size:
        raise InvalidUpdateError(
            f"{path}: tensor {name_at(tensors, int(bad[0]))!r}: expected finite weights after it, found NaN or Inf; "
            "send it again",
            code="not_finite",
        )
    moved = unflatten(tensors, new)
    return Weights(base.fingerprint, round_, base.layout, {name: moved[name] for name in base.tensors})
