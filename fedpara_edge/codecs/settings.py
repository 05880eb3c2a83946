"""The settings of a codec in the header of a file, compared with what that codec takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpara_edge.errors import InvalidUpdateError, brief
from fedpara_edge.storage.tensorfile import TensorFile

UPDATE = "update fedpara-edge here"


def read_settings(file: TensorFile, codec: str, settings: Mapping[str, Any], **ranges: Sequence[int]) -> dict[str, int]:
    """The settings, each one of the integers it may be, and no others.

    Args:
        file: that states them.
        codec: its name.
        settings: what the header states besides name and version.
        ranges: what each setting may be, by name: a range, or a few integers.

    Raises:
        InvalidUpdateError: one is missing, unknown or out of range.
    """
    if settings.keys() != ranges.keys():
        raise InvalidUpdateError(
            f"{file.path}: codec {codec}: expected {'the settings ' + ', '.join(ranges) if ranges else 'no settings'}, "
            f"found {brief(sorted(settings), most=80)}; {UPDATE}",
            code="unknown_codec",
        )
    for name, allowed in ranges.items():
        value = settings[name]
        if type(value) is not int or value not in allowed:
            raise InvalidUpdateError(
                f"{file.path}: codec {codec}: {name}: expected {_text(allowed)}, found {brief(value, most=40)}; "
                f"{UPDATE}",
                code="unknown_codec",
            )
    return dict(settings)


def _text(allowed: Sequence[int]) -> str:
    if isinstance(allowed, range):
        return f"an integer from {allowed[0]} to {allowed[-1]}"
    return " or ".join(map(str, allowed))
