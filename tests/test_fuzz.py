"""Mutants of every format read as something consistent or are refused: a sample of what `make fuzz` tries."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzed import FORMATS

ROOT = Path(__file__).parent.parent
COUNT = 400
WRITTEN_ONLY = {"comparison"}
"""Formats that nothing of this project reads."""
OF_OTHERS = {
    *("installation", "demo.federation", "sources.cache", "storage.tomlfile", "sources.images", "sources.sounds"),
    "fleet.up",
}
"""Modules that parse what pip, a child of ours or they themselves wrote, or for another reader here."""
PARSES = re.compile(
    r"\b(json\.loads?|strict_json|tomllib\.loads?|read_toml|NpzFile|np\.load|csv\.reader|Metadata\[\w+\]\.from_\w+|"
    r"load_pem_private_key|parse_entries)\(|protobuf import fields"
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of CPU time and memory as Linux has them")
def test_a_mutant_reads_as_something_consistent_or_is_refused() -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--count", str(COUNT), "--even"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(" 0 faults ") == len(FORMATS)


def test_every_format_is_mutated() -> None:
    stated = set()
    for package in ("fedpara_edge", "device_runtime", "export"):
        for path in (ROOT / package).rglob("*.py"):
            stated |= set(re.findall(r'= "fedpara-edge/([a-z-]+)"', path.read_text(encoding="utf-8")))
    assert stated == WRITTEN_ONLY | {name for format in FORMATS.values() for name in format.states}


def test_every_module_that_parses_is_reached() -> None:
    parsing = set()
    for package in ("fedpara_edge", "device_runtime"):
        for path in (ROOT / package).rglob("*.py"):
            code = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if ">>>" not in line)
            if PARSES.search(re.sub(r"\bdef \w+\(", "", code)):
                parts = path.relative_to(ROOT / package).with_suffix("").parts
                parsing.add(".".join(part for part in parts if part != "__init__"))
    assert parsing - OF_OTHERS == {name for format in FORMATS.values() for name in format.readers}
