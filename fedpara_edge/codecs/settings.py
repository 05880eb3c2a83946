"""Settings of a codec in the header of a file, checked against those that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpara_edge.errors import InvalidUpdateError, brief
from fedpara_edge.storage.tensorfile import TensorFile

UPDATE = "update fedpara-edge here"
"""Remedy for a file of a newer release."""


def read_settings(file: TensorFile, codec: str, settings: Mapping[str, Any], **ranges: Sequence[int]) -> dict[str, int]:
    """Settings of a codec, each checked to be one of the integers that it may be.

    Args:
        file: Open file whose header states the settings.
        codec: Codec name.
        settings: Header fields of the codec besides its name and version.
        ranges: Values that each setting may have, by name: a range, or a few integers.

    Raises:
        InvalidUpdateError: A setting is missing, unknown or out of range.
    """
    if settings.keys() != ranges.keys():
        raise InvalidUpdateError(
            f"{file.path}: codec {codec}: expected {'the settings ' + ', '.join(ranges) if ranges else 'no settings'}, "
            f"found {brief(sorted(settings), max_length=80)}; {UPDATE}",
            code="unknown_codec",
        )
    for name, allowed in ranges.items():
        value = settings[name]
        if type(value) is not int or value not in allowed:
            raise InvalidUpdateError(
                f"{file.path}: codec {codec}: {name}: expected {_text(allowed)}, found {brief(value, max_length=40)}; "
                f"{UPDATE}",
                code="unknown_codec",
            )
    return dict(settings)


def _text(allowed: Sequence[int]) -> str:
    if isinstance(allowed, range):
        return f"an integer from {allowed[0]} to {allowed[-1]}"
    return " or ".join(map(str, allowed))
