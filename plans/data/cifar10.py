"""Make `cifar10_12k.npz`: the first 10,000 training and 2,000 test images of CIFAR-10 in the raw file's order.

    x_train uint8 [n, 3, 32, 32], y_train int64 [n], x_test, y_test

The raw file has every image as a JPEG of quality 75, so these are not the original pixels: report results on them as
those of "CIFAR-10 (JPEG q75)". Image i is `header` + `scans[offsets[i]:offsets[i + 1]]`. Needs Pillow, which the extra
`report` brings.

    python plans/data/cifar10.py
    python plans/data/cifar10.py --train 50000 --test 10000      # all of it, cifar10_60k.npz
"""

from __future__ import annotations

import io
from pathlib import Path

import click
import numpy as np
from raw import HERE, read, source_option, write


def decode(files: list[bytes]) -> np.ndarray:
    """Pixels uint8 [n, 3, 32, 32] of JPEG files of 32x32 color images."""
    try:
        from PIL import Image
    except ImportError as error:
        raise click.ClickException(
            "Pillow: expected it to be installed, found none; run pip install -c constraints.txt '.[report]'"
        ) from error
    images = np.empty((len(files), 3, 32, 32), np.uint8)
    for number, file in enumerate(files):
        images[number] = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).transpose(2, 0, 1)
    return images


@click.command()
@source_option("cifar10_q75_jpeg_full.npz")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: plans/data/cifar10_<thousands>k.npz]")
@click.option("--train", type=click.IntRange(1, 50_000), default=10_000, show_default=True)
@click.option("--test", type=click.IntRange(1, 10_000), default=2_000, show_default=True)
def main(source: Path, output: Path | None, train: int, test: int) -> None:
    """Decode the first images of each split."""
    names = ("header", "scans", "offsets", "y", "is_test")
    raw = read(source, names, content="CIFAR-10 as JPEG files")
    header, ends = raw["header"].tobytes(), raw["offsets"].astype(np.int64)
    arrays = {}
    for split, count, chosen in (("train", train, ~raw["is_test"]), ("test", test, raw["is_test"])):
        rows = np.flatnonzero(chosen)[:count]
        arrays[f"x_{split}"] = decode([header + raw["scans"][ends[row] : ends[row + 1]].tobytes() for row in rows])
        arrays[f"y_{split}"] = raw["y"][rows].astype(np.int64)
    write(output or HERE / f"cifar10_{(train + test) // 1000}k.npz", arrays)


if __name__ == "__main__":
    main()
