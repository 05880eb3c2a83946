"""Data that people have, turned into arrays: images and sounds in folders by class, and tables.

| source                                | x                                         | y                               |
|---------------------------------------|-------------------------------------------|---------------------------------|
| folder of images (`images`)           | uint8 [N, channels, height, width]        | class, int64 [N]                |
| folder of sounds (`sounds`)           | float32 [N, channels, samples] in [-1, 1] | class, int64 [N]                |
| `.csv`, `.tsv`, `.parquet` (`tables`) | float32 or int64 [N, columns]             | int64 or float32 [N], or [N, K] |
| such a table in windows (`examples`)  | float32 or int64 [N, window, columns]     | as of a row                     |

Beside them, `y_names` has the names of the classes [C] where they are names, in the order of their numbers; `files` the
name of each file [N]; and every column of a table its own array. The arrays are written once, to be memory-mapped
(`cache`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.sources import images, sounds, tables
from device_runtime.sources.cache import cached
from device_runtime.sources.examples import examples_of
from device_runtime.sources.folders import files_by_class, listed
from device_runtime.sources.images import read_images
from device_runtime.sources.reading import Reading, Wanted, given
from device_runtime.sources.sounds import read_sounds
from device_runtime.sources.tables import read_table
from fedpara_edge.errors import InputError
from fedpara_edge.storage.atomic import check_output, replacing_folder

__all__ = ["Reading", "Wanted", "as_arrays", "convert_source", "is_source"]

NAMES = "y_names"
"""Array with the names of the classes."""
PLAIN, ANY = Reading(), Wanted()
_OPTIONS: Mapping[str, frozenset[str]] = {
    "arrays": frozenset(),
    "images": frozenset({"image_size"}),
    "sounds": frozenset({"audio_samples"}),
    "a table": frozenset({"label_column", "column", "window", "stride", "window_key"}),
}
"""Options that have an effect, by the kind of the source."""


def is_source(path: Path) -> bool:
    """Whether a path is a table, or a folder of images or sounds, rather than arrays."""
    if path.is_dir():
        return not any(path.glob("*.npy")) and bool(listed(path, images.SUFFIXES | sounds.SUFFIXES))
    return path.is_file() and path.suffix.lower() in tables.SUFFIXES


def as_arrays(path: Path, reading: Reading = PLAIN, wanted: Wanted = ANY) -> Path:
    """Folder of `.npy` files with the arrays of a source, from the cache if it is there; other paths as they are.

    Args:
        path: Source, or a file or folder of arrays.
        reading: Options for reading it.
        wanted: Shape and dtype that a model expects of its input.

    Raises:
        InputError: A file does not fit, or a package is needed and not installed.
        FedparaError: The disk refuses a write.
    """
    _check_effect(path, reading)
    if not is_source(path):
        return path
    files, how = _files(path), f"{reading} {_decisive(path, wanted)}"

    def convert(folder: Path) -> None:
        _convert(path, folder, reading, wanted)

    return cached(path, files, how, convert)


def convert_source(
    path: Path, folder: Path, reading: Reading = PLAIN, wanted: Wanted = ANY, *, overwrite: bool = False
) -> None:
    """Write the arrays of a source to a folder of `.npy` files, for a machine that can't read the source.

    Args:
        path: Source.
        folder: Folder to write.
        reading: Options for reading it.
        wanted: Shape and dtype that a model expects of its input.
        overwrite: Whether `folder` may exist.

    Raises:
        InputError: `path` is no source, a file does not fit, or a package is needed and not installed.
        OutputExistsError: `folder` exists.
        FedparaError: The disk refuses a write.
    """
    check_output(folder, overwrite=overwrite, folder=True)
    if not is_source(path):
        raise InputError(
            f"{path}: expected a table ({', '.join(sorted(tables.SUFFIXES))}) or a folder with images or sounds by "
            f"class, found {'something else' if path.exists() else 'nothing'}; check the path"
        )
    _check_effect(path, reading)
    with replacing_folder(folder) as making:
        _convert(path, making, reading, wanted)


def _check_effect(path: Path, reading: Reading) -> None:
    """Refuse an option without effect on this source."""
    kind = "arrays"
    if is_source(path):
        kind = ("images" if _suffixes(path) is images.SUFFIXES else "sounds") if path.is_dir() else "a table"
    for name in given(reading):
        if name not in _OPTIONS[kind]:
            raise InputError(
                f"expected for another kind of data, found for {path}, which is {kind}; leave it out", key=name
            )


def _files(path: Path) -> tuple[Path, ...]:
    return listed(path, _suffixes(path)) if path.is_dir() else (path,)


def _suffixes(folder: Path) -> frozenset[str]:
    """Endings of the files that count: of images if there are any, and else of sounds."""
    return images.SUFFIXES if listed(folder, images.SUFFIXES) else sounds.SUFFIXES


def _decisive(path: Path, wanted: Wanted) -> str:
    """The part of what a model wants on which the arrays depend."""
    if path.is_dir():
        return str(_channels(wanted)) if _suffixes(path) is images.SUFFIXES else ""
    return str(wanted)


def _channels(wanted: Wanted) -> int | None:
    """Channels of images that a model wants; None if that is not known."""
    shape = wanted.shape or ()
    if len(shape) == 2:
        return 1
    return shape[0] if len(shape) == 3 and shape[0] in images.MODES else None


def _convert(path: Path, folder: Path, reading: Reading, wanted: Wanted) -> None:
    if not path.is_dir():
        arrays = examples_of(path, read_table(path), reading, wanted)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        _tell(path, arrays["x"].shape, arrays.get(NAMES))
        return
    of_images = _suffixes(path) is images.SUFFIXES
    found = files_by_class(path, _suffixes(path))
    each: Iterator[NDArray[Any]]
    if of_images:
        each = read_images(found.files, size=reading.image_size, channels=_channels(wanted))
    else:
        each = read_sounds(found.files, samples=reading.audio_samples)
    shape = _write_rows(folder / "x.npy", each, len(found.files))
    np.save(folder / "files.npy", np.array([str(file.relative_to(path)) for file in found.files]))
    if found.labels is not None:
        np.save(folder / "y.npy", found.labels)
        np.save(folder / f"{NAMES}.npy", np.array(found.names))
    _tell(path, shape, found.names)


def _write_rows(path: Path, rows: Iterator[NDArray[Any]], count: int) -> tuple[int, ...]:
    """Write arrays of one shape as the rows of one array, one at a time; its shape."""
    first = next(rows)
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=first.dtype, shape=(count, *first.shape))
    mapped[0] = first
    for number, row in enumerate(rows, 1):
        mapped[number] = row
    mapped.flush()
    return tuple(mapped.shape)


def _tell(path: Path, shape: tuple[int, ...], names: Any) -> None:
    """Print to stderr what was made of a source, as a label that is read wrongly shows nowhere else."""
    listed_names = [] if names is None else [str(name) for name in names]
    classes = (
        f", classes {', '.join(listed_names[:10])}{' …' if len(listed_names) > 10 else ''}" if listed_names else ""
    )
    print(f"{path}: converted to x {list(shape)}{classes}", file=sys.stderr)
