"""The weights file: all shared tensors of a model after a round.

Format `fedpara-edge/weights`, version 1 (container: `tensorfile`). Header:

    format, version
    fingerprint   hexadecimal; which bundle the weights belong to
    round         how many rounds of aggregation they have been through; 0 for the initial weights
    layout        layers and tensors (`Layout.to_json`), so that the file explains itself

and one float32 tensor for every tensor of role `shared`, under its own name and shape.

The *base* that updates refer to is a SHA-256 of the content, so that weights rebuilt elsewhere have it too: of the
UTF-8 text "<fingerprint> <round>\\n", then, by name, of each tensor's name in UTF-8, a zero byte, and its values in C
order as little-endian float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import FedparaError, InputError, WrongBundleError, brief, brief_text
from fedpara_edge.layout import Layout
from fedpara_edge.tensorfile import TensorFile, write_tensors

FORMAT = "fedpara-edge/weights"
MAX_ROUND = 1 << 40


@dataclass(frozen=True)
class Weights:
    """The content of a weights file.

    Args:
        fingerprint: of the bundle.
        round: number of rounds behind these weights.
        layout: layers and tensors of the model.
        tensors: float32 arrays, the shared tensors by name.
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


def write_weights(path: Path, weights: Weights) -> None:
    """Write a weights file, atomically.

    Raises:
        FedparaError: a value is not finite, or the disk refuses the write.
    """
    for name, tensor in weights.tensors.items():
        if not np.isfinite(tensor).all():
            raise FedparaError(
                f"{path}: tensor {name!r}: expected finite weights, found NaN or Inf; nothing was written"
            )
    header = {
        "format": FORMAT,
        "version": 1,
        "fingerprint": weights.fingerprint,
        "round": weights.round,
        "layout": weights.layout.to_json(),
    }
    write_tensors(path, weights.tensors, header)


def read_weights(path: Path) -> Weights:
    """Read and verify a weights file.

    Raises:
        WrongBundleError: it is missing, damaged, of another format, its tensors do not fit its own layout, or a value
            is not finite.
    """
    with TensorFile(path, format=FORMAT, error=WrongBundleError) as file:
        try:
            layout = Layout.from_json(file.header["layout"])
            fingerprint, number = _identity(file.header)
        except (InputError, KeyError) as error:
            raise WrongBundleError(
                f"{path}: expected the header of a weights file, found {brief_text(str(error), most=200)}; use weights "
                "written by export or aggregate"
            ) from error
        expected = {tensor.name: ("float32", tensor.shape) for tensor in layout.shared}
        found = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        if expected != found:
            name = min(set(expected.items()) ^ set(found.items()))[0]
            raise WrongBundleError(
                f"{path}: tensor {brief(name)}: expected {expected.get(name)}, found {found.get(name)}; "
                "use weights written by export or aggregate"
            )
        tensors: dict[str, NDArray[Any]] = {name: file.read(name) for name in file.entries}
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise WrongBundleError(
                    f"{path}: tensor {brief(name)}: expected finite weights, found NaN or Inf; use those of "
                    "another round"
                )
        return Weights(fingerprint, number, layout, tensors)


def _identity(header: Mapping[str, Any]) -> tuple[str, int]:
    fingerprint, number = header["fingerprint"], header["round"]
    if not isinstance(fingerprint, str) or not fingerprint.isprintable():
        raise InputError(f"fingerprint {brief(fingerprint)}")
    if type(number) is not int or not 0 <= number <= MAX_ROUND:
        raise InputError(f"round {brief(number)} where a number from 0 to {MAX_ROUND} is expected")
    return fingerprint, number
