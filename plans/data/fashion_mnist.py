"""Make `fashion_mnist_12k.npz` from Debian's package dataset-fashion-mnist (MIT licence, Zalando SE).

The first 10,000 training and the first 2,000 test images of Fashion-MNIST, unchanged:

    x_train uint8 [10000, 1, 28, 28], y_train int64 [10000], x_test uint8 [2000, 1, 28, 28], y_test int64 [2000]

Run on Debian or Ubuntu, with the package index up to date; needs numpy, apt-get and dpkg-deb, and no root:

    python plans/data/fashion_mnist.py fedpara_edge/demo/fashion_mnist_12k.npz
"""

import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PACKAGE = "dataset-fashion-mnist"
SUBSETS = {"train": ("train", 10_000), "test": ("t10k", 2_000)}


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file: 2 zero bytes, type 8 (uint8), rank, big-endian sizes, data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: expected an IDX file of bytes, found {data[:4]!r}")
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def main() -> None:
    """Download the package, unpack it and write the subset."""
    output = Path(sys.argv[1])
    arrays = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["apt-get", "-q", "download", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        for subset, (prefix, count) in SUBSETS.items():
            (images,) = folder.rglob(f"{prefix}-images-idx3-ubyte.gz")
            (labels,) = folder.rglob(f"{prefix}-labels-idx1-ubyte.gz")
            arrays[f"x_{subset}"] = read_idx(images)[:count, None]
            arrays[f"y_{subset}"] = read_idx(labels)[:count].astype(np.int64)
    np.savez_compressed(output, **arrays)
    print(f"{output}: {', '.join(f'{key} {array.shape}' for key, array in arrays.items())}")


if __name__ == "__main__":
    main()
