"""How the change of the shared tensors is written into a file, and read back chunk by chunk (`codec`).

A codec is one module with an encoder, made from the options that the user types after its name, and an opener, found by
name and version, so that a release can read what older ones wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedpara_edge.codecs.codec import Decoder, Encoder, Opener
from fedpara_edge.codecs.float32 import Float32, open_float32
from fedpara_edge.errors import InputError, InvalidUpdateError
from fedpara_edge.layout import TensorSpec
from fedpara_edge.tensorfile import TensorFile

ENCODERS: Mapping[str, Callable[[], Encoder]] = {"float32": Float32}
OPENERS: Mapping[tuple[str, int], Opener] = {("float32", 1): open_float32}


def find_encoder(text: str) -> Encoder:
    """The encoder that a user asks for.

    Args:
        text: its name.

    Raises:
        InputError: there is none of that name.
    """
    if text not in ENCODERS:
        raise InputError(f"codec {text!r}: expected one of {', '.join(ENCODERS)}")
    return ENCODERS[text]()


def open_codec(file: TensorFile, tensors: Sequence[TensorSpec]) -> Decoder:
    """The decoder of an open file, by the codec that its header names.

    Args:
        file: the open file.
        tensors: the shared tensors, sorted by name.

    Raises:
        InvalidUpdateError: this release does not know the codec in that version, or what is stored does not fit.
    """
    stated = file.header.get("codec")
    settings = dict(stated) if isinstance(stated, dict) else {}
    name, version = settings.pop("name", None), settings.pop("version", None)
    opener = OPENERS.get((name, version)) if isinstance(name, str) and type(version) is int else None
    if opener is None:
        known = ", ".join(f"{name} version {version}" for name, version in OPENERS)
        raise InvalidUpdateError(
            f"{file.path}: expected a codec of {known}, found {str(stated)[:80]!r}; update the server",
            code="unknown_codec",
        )
    return opener(file, tensors, settings)
