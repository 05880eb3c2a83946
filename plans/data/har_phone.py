"""Make `har_phone.npz`: windows of two seconds of a phone's accelerometer and gyroscope, by subject.

    x float32 [n, 100, 6], y int64 [n] of five activities, subject int64 [n], execution int64 [n]

Windows of one execution overlap by 75 %, so hold out whole executions: `group = "execution"`. Accelerations are in g
and rotations in rad/s: the scales are constants of physics, the same for all, so that no client learns from another's
data.

    python plans/data/har_phone.py
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from raw import output_option, read, source_option, write

GRAVITY = 9.80665
"""One g in meters per second squared, the unit of the raw accelerations."""


@click.command()
@source_option("har_phone_by_subject.npz")
@output_option("har_phone.npz")
def main(source: Path, output: Path) -> None:
    """Scale the windows and write them."""
    raw = read(source, ("x", "y", "subject", "execution"), content="windows of a phone's sensors")
    scale = np.array([GRAVITY] * 3 + [1.0] * 3)
    integers = {name: raw[name].astype(np.int64) for name in ("y", "subject", "execution")}
    write(output, {"x": (raw["x"].astype(np.float64) / scale).astype(np.float32), **integers})


if __name__ == "__main__":
    main()
