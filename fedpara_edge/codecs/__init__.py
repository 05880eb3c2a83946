"""Codecs: how the change of the shared tensors is stored in a file, and read back chunk by chunk (`codec`).

A codec has an encoder, made from the options given after its name, and an opener, found by name and version, so that a
release can read what older ones wrote. All but `float32` combine the same few steps: a transform (`hadamard`), rounding
to integers (`rounding`) times scales (`scales`) of blocks (`blocks`), packing (`digits`, `halves`, `sparse`), entropy
coding (`frames`, `sparse`), and the chunks joined in one array (`payload`). Running statistics are stored apart, in 16
bits, by every codec but `float32` (`statistics`).

| codec                          | stored form of an entry, and options                                | module     |
|--------------------------------|---------------------------------------------------------------------|------------|
| `float32`                      | the entry itself                                                    | `float32`  |
| `float16`, `bfloat16`          | 16 bits                                                             | `floats`   |
| `int8`, `int4`, `int3`, `int2` | an integer times the scale of its block; `block=1024`, `entropy=1`  | `integers` |
| `rotated`                      | the same after a randomized rotation; `bits=4` and the same options | `rotated`  |
| `uniform`                      | an integer times a step; `step=2`, `by=all` or `by=tensor`          | `uniform`  |
| `topk`                         | zero, except for the largest entries; `share=0.05`, `bits=3`        | `topk`     |
| `adaptive`                     | as `uniform`, for `bytes=…` per change or a relative `error=…`      | `adaptive` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fedpara_edge.codecs.codec import Decoder, Encoder, Opener
from fedpara_edge.codecs.float32 import Float32
from fedpara_edge.codecs.settings import UPDATE
from fedpara_edge.codecs.statistics import (
    StatisticsDecoder,
    check_statistics,
    check_sum_of_statistics,
    without_statistics,
)
from fedpara_edge.errors import InvalidUpdateError, brief, brief_text
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.options import choose, typed
from fedpara_edge.registry import Registry
from fedpara_edge.storage.tensorfile import TensorFile

FLOAT32 = Float32()
"""Encoder of the codec `float32`."""

_FIXED: Mapping[str, Mapping[str, Any]] = {
    "float16": {"name": "float16"},
    "bfloat16": {"name": "bfloat16"},
    **{f"int{bits}": {"name": f"int{bits}", "bits": bits} for bits in (8, 4, 3, 2)},
}
"""Fields that the name of a codec determines."""

ENCODERS: Mapping[str, tuple[type[Encoder], Mapping[str, Any]]] = Registry(
    __name__,
    {
        "float32": "float32:Float32",
        "float16": "floats:Float16",
        "bfloat16": "floats:Float16",
        **dict.fromkeys(("int8", "int4", "int3", "int2"), "integers:Integers"),
        "rotated": "rotated:Rotated",
        "uniform": "uniform:Uniform",
        "topk": "topk:TopK",
        "adaptive": "adaptive:Adaptive",
    },
    lambda kind, name: (kind, _FIXED.get(name, {})),
)
"""Encoder class of each codec by name, with the fields that the name determines."""

_OPENED: Mapping[tuple[str, int], Mapping[str, Any]] = {
    **{(name, 1): fixed for name, fixed in _FIXED.items()},
    ("int8", 2): {**_FIXED["int8"], "version": 2},
    **{("rotated", version): {"version": version} for version in (1, 2)},
}
"""Arguments that the name and the version of a codec determine."""

OPENERS: Mapping[tuple[str, int], Opener] = Registry(
    __name__,
    {
        ("float32", 1): "float32:open_float32",
        ("float16", 1): "floats:open_float16",
        ("bfloat16", 1): "floats:open_float16",
        **dict.fromkeys([("int8", 1), ("int4", 1), ("int3", 1), ("int2", 1), ("int8", 2)], "integers:open_integers"),
        **dict.fromkeys([("rotated", 1), ("rotated", 2)], "rotated:open_rotated"),
        ("uniform", 1): "uniform:open_uniform",
        ("topk", 1): "topk:open_topk",
    },
    lambda opener, codec: partial(opener, **_OPENED.get(codec, {})),
)
"""Opener of every codec that this release reads, by name and version."""


def find_encoder(text: str) -> Encoder:
    """Encoder for a codec written as text.

    Args:
        text: Codec name, and options after a colon: `uniform:step=1.5,by=tensor`.

    Raises:
        InputError: The name or an option is unknown, an option is out of range, or a package is missing.
    """
    encoder: Encoder = choose(ENCODERS, text, key="codec")
    return encoder


def spelled(encoder: Encoder) -> str:
    """Text from which `find_encoder` makes an encoder, with the options that differ from their defaults.

    >>> spelled(find_encoder("uniform:by=tensor,step=2"))
    'uniform:by=tensor'
    """
    kind, fixed = ENCODERS.get(encoder.name, (None, {}))
    return typed(encoder.name, encoder, hidden=fixed) if type(encoder) is kind else repr(encoder)


def open_codec(
    file: TensorFile,
    tensors: Sequence[TensorSpec],
    *,
    unstated: Mapping[str, Any] | None = None,
    further: Mapping[tuple[str, int], Opener] = {},
) -> Decoder:
    """Decoder of an open file, chosen by the codec that its header names.

    Args:
        file: Open file.
        tensors: Shared tensors, in the order of the flat change.
        unstated: Codec of a file that names none; None where it must.
        further: Openers of codecs that the file may have besides those in `OPENERS`.

    Raises:
        InvalidUpdateError: This release does not know the codec or its version, or the stored data does not fit.
        InputError: A package that the codec needs is missing.
    """
    stated = file.header.get("codec", unstated)
    settings = dict(stated) if isinstance(stated, dict) else {}
    name, version = settings.pop("name", None), settings.pop("version", None)
    opener: Opener | None = None
    if isinstance(name, str) and type(version) is int:
        opener = further.get((name, version)) or OPENERS.get((name, version))
    if opener is None:
        known = ", ".join(f"{name} version {version}" for name, version in (*OPENERS, *further))
        found = brief(stated) if name is None else f"{brief_text(name)} version {brief(version)}"
        raise InvalidUpdateError(
            f"{file.path}: expected one of the codecs {known}, found {found}; {UPDATE}",
            code="unknown_codec",
        )
    if name == Float32.name:
        return opener(file, tensors, settings)
    check_statistics(file, tensors)
    trained = without_statistics(tensors)
    decoder = opener(file, trained, settings)
    entries = sum(tensor.size for tensor in trained)
    if len(trained) == len(tensors):
        return decoder
    check_sum_of_statistics(file, entries)
    return StatisticsDecoder(decoder, entries, file)
