"""How the change of the shared tensors is written into a file, and read back chunk by chunk (`codec`).

A codec has an encoder, made from the options that the user types after its name, and an opener, found by name and
version, so that a release can read what older ones wrote. All but `float32` are the same few steps in other
combinations: a transform (`hadamard`), rounding to integers (`rounding`) times scales (`scales`) of blocks (`blocks`),
packing (`digits`, `halves`, `sparse`), entropy coding (`frames`, `sparse`), and the chunks in one array (`payload`).

| typed                          | an entry becomes                                                   | module     |
|--------------------------------|--------------------------------------------------------------------|------------|
| `float32`                      | itself                                                             | `float32`  |
| `float16`, `bfloat16`          | 16 bits                                                            | `floats`   |
| `int8`, `int4`, `int3`, `int2` | an integer times the scale of its block; `block=1024`, `entropy=1` | `integers` |
| `rotated`                      | so, after a randomized rotation; `bits=4` and these                | `integers` |
| `uniform`                      | an integer times a step; `step=2`, `by=all` or `by=tensor`         | `uniform`  |
| `topk`                         | zero, but for the largest; `share=0.05`, `bits=3`                  | `topk`     |
| `adaptive`                     | as `uniform`, for `bytes=…` a change or a relative `error=…`       | `adaptive` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fedpara_edge.codecs.adaptive import Adaptive
from fedpara_edge.codecs.codec import Decoder, Encoder, Opener
from fedpara_edge.codecs.float32 import Float32, open_float32
from fedpara_edge.codecs.floats import Float16, open_float16
from fedpara_edge.codecs.integers import Integers, open_integers
from fedpara_edge.codecs.options import parse_options, split_name
from fedpara_edge.codecs.settings import UPDATE
from fedpara_edge.codecs.topk import TopK, open_topk
from fedpara_edge.codecs.uniform import Uniform, open_uniform
from fedpara_edge.errors import InputError, InvalidUpdateError, brief, brief_text
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile

_INTEGERS: Mapping[str, type] = {"block": int, "entropy": int}
ENCODERS: Mapping[str, tuple[Callable[..., Encoder], Mapping[str, type]]] = {
    "float32": (Float32, {}),
    "float16": (partial(Float16, "float16"), {}),
    "bfloat16": (partial(Float16, "bfloat16"), {}),
    **{f"int{bits}": (partial(Integers, name=f"int{bits}", bits=bits), _INTEGERS) for bits in (8, 4, 3, 2)},
    "rotated": (partial(Integers, name="rotated", bits=4), {"bits": int, **_INTEGERS}),
    "uniform": (Uniform, {"step": float, "by": str}),
    "topk": (TopK, {"share": float, "bits": int}),
    "adaptive": (Adaptive, {"bytes": int, "error": float}),
}
"""What makes an encoder, and the types of the options it takes, by name."""

OPENERS: Mapping[tuple[str, int], Opener] = {
    ("float32", 1): open_float32,
    ("float16", 1): partial(open_float16, name="float16"),
    ("bfloat16", 1): partial(open_float16, name="bfloat16"),
    **{(f"int{bits}", 1): partial(open_integers, name=f"int{bits}", bits=bits) for bits in (8, 4, 3, 2)},
    ("int8", 2): partial(open_integers, name="int8", bits=8, version=2),
    ("rotated", 1): partial(open_integers, name="rotated"),
    ("uniform", 1): open_uniform,
    ("topk", 1): open_topk,
}


def find_encoder(text: str) -> Encoder:
    """The encoder that a user asks for.

    Args:
        text: its name, and options after a colon: `uniform:step=1.5,by=tensor`.

    Raises:
        InputError: there is none of that name, an option is unknown or out of range, or a package is missing.
    """
    name, options = split_name(text)
    if name not in ENCODERS:
        raise InputError(f"codec {name!r}: expected one of {', '.join(ENCODERS)}")
    make, types = ENCODERS[name]
    return make(**parse_options(text, options, types))


def open_codec(file: TensorFile, tensors: Sequence[TensorSpec]) -> Decoder:
    """The decoder of an open file, by the codec that its header names.

    Args:
        file: the open file.
        tensors: the shared tensors, sorted by name.

    Raises:
        InvalidUpdateError: this release does not know the codec in that version, or what is stored does not fit.
        InputError: a package that this codec needs is missing here.
    """
    stated = file.header.get("codec")
    settings = dict(stated) if isinstance(stated, dict) else {}
    name, version = settings.pop("name", None), settings.pop("version", None)
    opener = OPENERS.get((name, version)) if isinstance(name, str) and type(version) is int else None
    if opener is None:
        known = ", ".join(f"{name} version {version}" for name, version in OPENERS)
        found = brief(stated) if name is None else f"{brief_text(name)} version {brief(version)}"
        raise InvalidUpdateError(
            f"{file.path}: expected a codec of {known}, found {found}; {UPDATE}",
            code="unknown_codec",
        )
    return opener(file, tensors, settings)
