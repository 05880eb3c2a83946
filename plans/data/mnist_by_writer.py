"""Make `mnist_by_writer.npz`: 10,000 handwritten digits, by writer.

    x uint8 [n, 1, 28, 28], y int64 [n], writer int64 [n], device int64 [n]

These are MNIST's test digits with QMNIST's 297 writers, who have 8 to 130 digits each. For federations of a thousand
clients, several devices share the digits of each writer, in order, in proportion to their number: 1,000 devices, each
with the digits of one writer.

    python plans/data/mnist_by_writer.py
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from raw import output_option, read, source_option, write

DEVICES = 1000


def devices_of(writer: np.ndarray, devices: int = DEVICES) -> np.ndarray:
    """Device of each digit, int64 [n], from 0 on: each has digits of one writer, as many as others or one more or less.

    Args:
        writer: Writer of each digit, int64 [n].
        devices: Number of devices, from one a writer to one a digit.

    >>> devices_of(np.array([7, 7, 7, 7, 9, 9]), 3).tolist()
    [0, 0, 1, 1, 2, 2]
    """
    writers, digits = np.unique(writer, return_counts=True)
    shares = np.ones(len(writers), np.int64)
    for _ in range(devices - len(writers)):
        shares[np.argmax(digits / shares)] += 1
    device, first = np.empty(len(writer), np.int64), 0
    for name, count, share in zip(writers, digits, shares, strict=True):
        device[writer == name] = first + np.arange(count) * share // count
        first += share
    return device


@click.command()
@source_option("mnist10k_by_writer.npz")
@output_option("mnist_by_writer.npz")
def main(source: Path, output: Path) -> None:
    """Write the digits in the shape and dtypes that the models take."""
    raw = read(source, ("x", "y", "writer"), content="MNIST digits and their writers")
    integers = {name: raw[name].astype(np.int64) for name in ("y", "writer")}
    write(output, {"x": raw["x"][:, None], **integers, "device": devices_of(integers["writer"])})


if __name__ == "__main__":
    main()
