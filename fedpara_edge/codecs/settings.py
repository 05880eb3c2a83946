"""The settings of a codec in the header of a file, compared with what that codec takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.tensorfile import TensorFile


def read_settings(file: TensorFile, codec: str, settings: Mapping[str, Any], **ranges: range) -> dict[str, int]:
    """The settings, each an integer in its range, and no others.

    Args:
        file: that states them.
        codec: its name.
        settings: what the header states besides name and version.
        ranges: of each setting, by name.

    Raises:
        InvalidUpdateError: one is missing, unknown or out of range.
    """
    if settings.keys() != ranges.keys():
        raise InvalidUpdateError(
            f"{file.path}: codec {codec}: expected {'the settings ' + ', '.join(ranges) if ranges else 'no settings'}, "
            f"found {str(sorted(map(str, settings)))[:80]}; update the server",
            code="unknown_codec",
        )
    for name, allowed in ranges.items():
        value = settings[name]
        if type(value) is not int or value not in allowed:
            raise InvalidUpdateError(
                f"{file.path}: codec {codec}: {name}: expected an integer from {allowed[0]} to {allowed[-1]}, "
                f"found {str(value)[:40]}; update the server",
                code="unknown_codec",
            )
    return dict(settings)
