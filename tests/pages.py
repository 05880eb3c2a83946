"""The blocks of a page of documentation: files to save, Python to run, and commands with what they print."""

import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(
    r"(?:as\s+`(?P<name>[\w.-]+)`:\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)


def blocks(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Language and text of each block of a page, and the name of the file that it is to be saved as."""
    for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
        yield block["language"], block["text"], block["name"]


def commands(block: str) -> list[tuple[str, str]]:
    """Each `$ command` with the output below it."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    pairs = [part.replace("\\\n", " ").partition("\n") for part in parts]
    return [(command, output) for command, _, output in pairs]
