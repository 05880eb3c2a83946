"""Make `mnist_by_writer.npz`: 10,000 handwritten digits, by writer.

    x uint8 [n, 1, 28, 28], y int64 [n], writer int64 [n]

These are MNIST's test digits with QMNIST's 297 writers, who have 8 to 130 digits each.

    python plans/data/mnist_by_writer.py
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from raw import output_option, read, source_option, write


@click.command()
@source_option("mnist10k_by_writer.npz")
@output_option("mnist_by_writer.npz")
def main(source: Path, output: Path) -> None:
    """Write the digits in the shape and dtypes that the models take."""
    raw = read(source, ("x", "y", "writer"), content="MNIST digits and their writers")
    integers = {name: raw[name].astype(np.int64) for name in ("y", "writer")}
    write(output, {"x": raw["x"][:, None], **integers})


if __name__ == "__main__":
    main()
