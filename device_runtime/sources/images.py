"""Images, read with Pillow: uint8 [C, H, W], one channel for gray ones, three for colors, four with transparency."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.installation import install_line

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
GRAY = frozenset({"1", "L"})
WIDE = frozenset({"I", "F", "I;16", "I;16B", "I;16L"})
"""Modes of Pillow with more than 8 bits a channel."""


def read_images(
    files: tuple[Path, ...], *, size: tuple[int, int] | None, channels: int | None
) -> Iterator[NDArray[np.uint8]]:
    """Images, uint8 [C, H, W] of the same shape, turned upright.

    Args:
        files: Files, at least one.
        size: Height and width to resize to; None for those of the first image, which all must have.
        channels: 1, 3 or 4; None for 1 if the first image is gray, and 3 otherwise.

    Raises:
        InputError: Pillow is not installed, or a file is damaged, of another size or of more than 8 bits a channel.
    """
    wanted = size
    for file in files:
        image = _open(file)
        channels = channels or (1 if image.mode in GRAY else 3)
        if size is not None and image.size != (size[1], size[0]):
            pillow = _imports()
            bilinear = pillow["image"].Resampling.BILINEAR
            image = pillow["ops"].fit(image.convert(MODES[channels]), (size[1], size[0]), bilinear)
        array = np.asarray(image.convert(MODES[channels]), np.uint8)
        wanted = wanted or array.shape[:2]
        if array.shape[:2] != wanted:
            raise InputError(
                f"{file}: expected an image of {wanted[0]}x{wanted[1]} as the first, found {array.shape[0]}x"
                f"{array.shape[1]}; resize all with --image-size {wanted[0]},{wanted[1]} or another size"
            )
        yield np.ascontiguousarray(array.reshape(*wanted, channels).transpose(2, 0, 1))


def _open(file: Path) -> Any:
    pillow = _imports()
    try:
        with pillow["image"].open(file) as image:
            image.load()
            upright = pillow["ops"].exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError, pillow["image"].DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: expected a whole image, found {reason}; replace or remove it") from error
    if upright.mode in WIDE:
        raise InputError(
            f"{file}: expected 8 bits a channel, found mode {upright.mode} of more; convert it, or save the values as "
            "float32 in an .npz"
        )
    return upright


def _imports() -> dict[str, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(
            f"images: expected Pillow, found none ({error}); type: {install_line('data')}, or convert them elsewhere "
            "with fedpara-edge data convert"
        ) from error
    return {"image": Image, "ops": ImageOps}
