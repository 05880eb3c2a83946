"""Files of rounds: `round-<n>.safetensors`, one for each number n that a folder has."""

from __future__ import annotations

from pathlib import Path


def round_path(folder: Path, number: int) -> Path:
    """Path of the file of a round.

    >>> round_path(Path("server"), 3).as_posix()
    'server/round-3.safetensors'
    """
    return folder / f"round-{number}.safetensors"


def rounds_in(folder: Path) -> list[int]:
    """Numbers of the rounds of which a folder has the file."""
    numbers = (path.stem.removeprefix("round-") for path in folder.glob("round-*.safetensors"))
    return [int(number) for number in numbers if number.isdecimal() and str(int(number)) == number]


def remove_rounds_before(folder: Path, number: int) -> None:
    """Remove the files of the rounds before one from a folder."""
    for earlier in rounds_in(folder):
        if earlier < number:
            round_path(folder, earlier).unlink(missing_ok=True)
