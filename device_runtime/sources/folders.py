"""Folders of files by class: a folder for each class, named as the class, with its files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassFiles:
    """Files in the order of their classes and names.

    Args:
        files: The files, N of them.
        labels: Number of each file's class, int64 [N]; None for files that lie in no folder of a class.
        names: Names of the classes, sorted.
    """

    files: tuple[Path, ...]
    labels: NDArray[np.int64] | None
    names: tuple[str, ...]


def files_by_class(folder: Path, suffixes: Collection[str]) -> ClassFiles:
    """List the files of a folder.

    Args:
        folder: Folder with a folder for each class, or with files alone.
        suffixes: Endings of their names, in lower case.

    Raises:
        InputError: Files lie deeper, or beside the folders of classes.
    """
    files = listed(folder, suffixes)
    depths = {len(file.relative_to(folder).parts) for file in files}
    if depths == {1}:
        return ClassFiles(files=files, labels=None, names=())
    if depths != {2}:
        odd = next(file for file in files if len(file.relative_to(folder).parts) != 2)
        raise InputError(
            f"{folder}: expected a folder for each class with its files in it, found {odd.relative_to(folder)}; give "
            "the folder that holds the classes, such as train/ or test/, and nothing beside them"
        )
    names = tuple(sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")))
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers[file.relative_to(folder).parts[0]] for file in files], np.int64)
    return ClassFiles(files=files, labels=labels, names=names)


def listed(folder: Path, suffixes: Collection[str]) -> tuple[Path, ...]:
    """Files below a folder with one of some endings, sorted by path, without hidden ones."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    return tuple(
        sorted(
            (file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)),
            key=lambda file: file.relative_to(folder).parts,
        )
    )
