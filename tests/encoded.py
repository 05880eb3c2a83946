"""Changes in files of every codec, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import small_round
from numpy.typing import NDArray

from fedpara_edge.codecs import ENCODERS, find_encoder, open_codec
from fedpara_edge.codecs.codec import Encoder, chunks
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

FORMAT = "a test"
VARIANTS = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "int4:block=50,entropy=0",
    "int3",
    "int2",
    "rotated",
    "rotated:bits=8,block=65536",
    "rotated:bits=2,block=100",
    "uniform",
    "uniform:step=0.01",
    "uniform:step=0.7,by=tensor",
    "uniform:step=6",
    "topk",
    "topk:share=0.5,bits=1",
    "topk:share=0.0001,bits=8",
    "adaptive:bytes=9000",
    "adaptive:error=0.3",
)
EVERY = (*VARIANTS, *(name for name in ENCODERS if not any(text.partition(":")[0] == name for text in VARIANTS)))
"""All codecs there are, some with several options; one that is registered and in no line above is tested as it is."""
UNBIASED = tuple(text for text in EVERY if text != "float32" and find_encoder(text).unbiased)


def tensors(*sizes: int) -> list[TensorSpec]:
    """Tensors of these sizes, sorted by name."""
    return [small_round.tensor(f"t{number:02}", (size,)) for number, size in enumerate(sizes)]


SIZES = (70_000, 1, 300, 2, 12, 1025, 64)
"""More than a chunk, so that a tensor lies in two, and the lengths that are awkward for blocks of powers of two."""


def changes(entries: int) -> Mapping[str, NDArray[np.float32]]:
    """Flat changes of every sort, by what they are."""
    random = np.random.default_rng(3)
    gauss = random.standard_normal(entries, np.float32)
    spike = np.zeros(entries, np.float32)
    spike[entries // 2] = -3e-5
    mixed = gauss * np.float32(1e-3)
    mixed[: entries // 3] *= np.float32(1e3)
    return {
        "gaussian": gauss,
        "heavy": (0.01 * random.standard_t(2, entries)).astype(np.float32),
        "mixed": mixed,
        "zero": np.zeros(entries, np.float32),
        "minus zero": np.full(entries, -0.0, np.float32),
        "spike": spike,
        "constant": np.full(entries, 7e-4, np.float32),
        "signs": np.copysign(np.float32(2e-3), gauss),
        "subnormal": (gauss * np.float32(1e-39)).astype(np.float32),
        "large": gauss * np.float32(1e20),
    }


def store(
    path: Path, encoder: Encoder, specs: Sequence[TensorSpec], change: NDArray[np.float32], seed: int | None
) -> NDArray[np.float32]:
    """Write a file; return what the encoder says will be decoded."""
    encoded = encoder.encode(specs, change, seed=seed)
    write(path, encoded.arrays, {"name": encoder.name, "version": encoder.version, **encoded.settings})
    return encoded.decoded


def write(path: Path, arrays: Mapping[str, NDArray[Any]], codec: Mapping[str, Any]) -> None:
    """Write a file of any arrays that claims to be of some codec."""
    write_tensors(path, arrays, {"format": FORMAT, "version": 1, "codec": codec})


def decode(path: Path, specs: Sequence[TensorSpec]) -> NDArray[np.float32]:
    """The flat change in a file, its chunks decoded backwards by two threads into what was there before."""
    out = np.full(sum(tensor.size for tensor in specs), np.nan, np.float32)
    with TensorFile(path, format=FORMAT, error=InvalidUpdateError) as file:
        decoder = open_codec(file, specs)
        with ThreadPoolExecutor(2) as pool:
            ranges = reversed(list(chunks(len(out))))
            list(pool.map(lambda piece: decoder.decode(piece[0], out[slice(*piece)]), ranges))
    return out
