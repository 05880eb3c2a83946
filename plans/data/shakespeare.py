"""Make `shakespeare.npz`: lines of the roles in Shakespeare's plays, cut into windows of 80 characters.

    x uint8 [n, 80], y uint8 [n, 80], role "play/ROLE" [n]

y is x one character later: the next character at every position, as the zoo's char-lstm learns it; `--label last` makes
it the one character after each window, uint8 [n], for a model that predicts only that. Windows of a role follow each
other without overlap, so rows can be held out one by one. What is left of a role and fills no window is dropped, and
so are the roles with fewer than 81 characters.

Characters are numbered by `ALPHABET`, as many as in LEAF's Shakespeare (arXiv 1812.01097), on which the paper trains;
all other characters, mostly tabs, count as blanks.

    python plans/data/shakespeare.py
"""

from __future__ import annotations

import string
from pathlib import Path

import click
import numpy as np
from raw import output_option, read, source_option, write

ALPHABET = "".join(sorted("\n !\"&'(),-.:;>?[]}" + string.ascii_letters + string.digits))
WINDOW = 80

assert len(ALPHABET) == 80


def numbered(text: bytes) -> np.ndarray:
    """Indices in `ALPHABET` of the characters of a text, uint8 [N]."""
    places = np.full(256, ALPHABET.index(" "), np.uint8)
    places[np.frombuffer(ALPHABET.encode("latin-1"), np.uint8)] = np.arange(len(ALPHABET))
    return places[np.frombuffer(text, np.uint8)]


@click.command()
@source_option("shakespeare_roles.npz")
@output_option("shakespeare.npz")
@click.option(
    "--label",
    type=click.Choice(["every", "last"]),
    default="every",
    show_default=True,
    help="Next character at every position, or only the one after the window.",
)
def main(source: Path, output: Path, label: str) -> None:
    """Cut every role's text into windows and the characters that follow."""
    raw = read(source, ("text", "offsets", "roles"), content="Shakespeare's roles")
    text, ends = numbered(raw["text"].tobytes()), raw["offsets"].astype(np.int64)
    x, y, role = [], [], []
    for number, name in enumerate(raw["roles"]):
        said = text[ends[number] : ends[number + 1]]
        count = (len(said) - 1) // WINDOW
        if count < 1:
            continue
        x.append(said[: count * WINDOW].reshape(count, WINDOW))
        following = said[1 : count * WINDOW + 1].reshape(count, WINDOW)
        y.append(following if label == "every" else following[:, -1])
        role += [str(name)] * count
    write(output, {"x": np.concatenate(x), "y": np.concatenate(y), "role": np.array(role)})


if __name__ == "__main__":
    main()
