"""Make `mnist_by_writer.npz`: 10,000 handwritten digits, by who wrote them.

    x uint8 [n, 1, 28, 28], y int64 [n], writer int64 [n]

MNIST's test digits, with the writers as QMNIST has them: 297, of 8 to 130 digits each.

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
    """Write the digits as the models take them."""
    raw = read(source, ("x", "y", "writer"), content="MNIST digits and their writers")
    integers = {name: raw[name].astype(np.int64) for name in ("y", "writer")}
    write(output, {"x": raw["x"][:, None], **integers})


if __name__ == "__main__":
    main()
