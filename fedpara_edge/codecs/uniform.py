"""The codec `uniform`, version 1: one step for all entries, or one per tensor, and as many levels as they need.

Setting: `block`, 0 for one step per chunk, or 65536 for one in each tensor's part of a chunk (`blocks`). The section of
a chunk (`payload`) is

    steps       bfloat16 of each block (`scales`)
    integers    `sparse`

and an entry is its integer times its step. One step for all entries needs no exception for biases, norms and small
tensors: where their changes are large they get the bits, and finer steps for them did not train better (measured on the
zoo's mlp and cnn, at 15 % more bytes). A step wider than most entries makes most integers zero, and zeros are cheap: at
half a bit to two bits per entry, no code that treats entries one by one does much better (Gish and Pierce 1968).

With a seed, integers are rounded at random: the decoded change is unbiased. Without, they are rounded to the nearest
with a dead zone around zero, and no step is larger than the largest entry that shares it, so that something is always
sent: a contraction, ‖x - decoded‖ < ‖x‖ (except for changes below 2^-100), which error feedback needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.codec import Encoded
from fedpara_edge.codecs.payload import EachAlone, PayloadDecoder, open_payload, write_payload
from fedpara_edge.codecs.rounding import generator, round_randomly, round_to_nearest
from fedpara_edge.codecs.scales import LARGEST as LARGEST_SCALE
from fedpara_edge.codecs.scales import check_range, from_bytes, round_up, to_bytes
from fedpara_edge.codecs.section import Section
from fedpara_edge.codecs.settings import read_settings
from fedpara_edge.codecs.sparse import LARGEST, decode_sparse, encode_sparse
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.options import check, option
from fedpara_edge.storage.tensorfile import TensorFile

_BY = {"all": 0, "tensor": 1 << 16}
_WIDEST_ZONE = 0.99  # in steps: rounding a step up may bring the largest entry down to 0.992 of it
NAME, VERSION = "uniform", 1


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Encoder with a step relative to the magnitude of the change.

    Args:
        step: Step over the root mean square of the entries that share it: all, or the tensor's part of a chunk.
        by: `all` for one step, which gives every entry the same error, in total the least for the bytes; `tensor` for
            one step relative to each tensor.
        name: Codec name stored in file headers.
        version: Codec version stored in file headers.

    Raises:
        InputError: An option is out of range.
    """

    step: float = option(
        2.0, minimum=1e-4, maximum=100, help="Step over the root mean square of the entries that share it."
    )
    by: str = option("all", choices=tuple(_BY), help="One step for all entries, or one relative to each tensor.")
    name: str = NAME
    version: int = VERSION
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self)

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:
        """Encode without bias given a seed, and rounded to the nearest otherwise."""
        check_range(tensors, change)
        if self.by == "all":
            wanted = self.step * root_mean_square(change)
            return encode_uniform(tensors, change, wanted, seed=seed, zone=dead_zone(self.step))
        return encode_uniform(tensors, change, None, seed=seed, zone=dead_zone(self.step), relative=self.step)


def root_mean_square(values: NDArray[np.float32]) -> float:
    """Root mean square √(Σ v² / n); 0 for no values."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


def dead_zone(step: float) -> float:
    """Dead zone (`round_to_nearest`) of least error for the bytes, for a step over the root mean square."""
    return 0.5 + min(0.15 * step, 0.2)


def encode_uniform(
    tensors: Sequence[TensorSpec],
    change: NDArray[np.float32],
    step: float | None,
    *,
    seed: int | None,
    zone: float,
    relative: float = 0.0,
) -> Encoded:
    """Encode a change with one step for all entries, or one per tensor.

    Args:
        tensors: Shared tensors, in the order of the flat change.
        change: Flat change, float32 [entries].
        step: Step of all entries; None for `relative` times the root mean square of each tensor in its chunk.
        seed: Seed of random rounding; None to round to the nearest.
        zone: Dead zone (`round_to_nearest`), in steps.
        relative: Step over the root mean square of a tensor in its chunk, used if `step` is None.
    """
    random = None if seed is None else generator(seed)
    common = None if step is None else _limit(np.array([step]), np.abs(change).max(initial=0), seed, zone)

    def write(_: int, values: NDArray[np.float32], lengths: NDArray[np.intp], decoded: NDArray[np.float32]) -> bytes:
        if common is None:
            starts = np.cumsum(lengths) - lengths
            sizes = np.sqrt(np.add.reduceat(np.square(values, dtype=np.float64), starts) / lengths)
            tops = np.maximum.reduceat(np.abs(values), starts)
            steps, zones = _limit(relative * sizes, tops, seed, zone)
            each, zones = np.repeat(steps, lengths), np.repeat(zones, lengths)
        else:
            steps, zones = common
            each = steps
        ratios = np.divide(values, np.where(each > 0, each, 1), dtype=np.float32)
        rounded = round_to_nearest(ratios, zones) if random is None else round_randomly(ratios, random)
        integers = rounded.astype(np.int32)
        np.multiply(integers.astype(np.float32), each, out=decoded)
        return to_bytes(steps) + encode_sparse(integers)

    block = _BY["tensor" if step is None else "all"]
    return write_payload(tensors, change, write, block=block, settings={"block": block})


def open_uniform(file: TensorFile, tensors: Sequence[TensorSpec], settings: Mapping[str, Any]) -> PayloadDecoder:
    """Decoder of a `uniform` file.

    Raises:
        InvalidUpdateError: A setting or the payload does not fit.
    """
    block = read_settings(file, NAME, settings, block=tuple(_BY.values()))["block"]

    def read(section: Section, lengths: NDArray[np.intp], out: NDArray[np.float32]) -> None:
        steps = from_bytes(section.take(2 * len(lengths), "steps"))
        positions, integers = decode_sparse(section, len(out))
        values = integers.astype(np.float32)
        values *= steps[0] if len(steps) == 1 else np.repeat(steps, lengths)[positions]
        out.fill(0)
        out[positions] = values

    return open_payload(file, tensors, EachAlone(read), block=block)


def _limit(
    steps: NDArray[np.float64], largest: NDArray[np.float32], seed: int | None, zone: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Steps as they are stored, and the dead zones in units of them.

    Without a seed no step is above the largest entry that shares it, and a dead zone that was wider stays as wide.
    """
    within = np.clip(steps, largest / (LARGEST - 1), LARGEST_SCALE)
    if seed is None:
        within = np.minimum(within, largest)
    stored = round_up(within)
    zones = np.minimum(zone * steps / np.where(stored > 0, stored, 1), _WIDEST_ZONE)
    return stored, np.maximum(zones, zone).astype(np.float32)
