"""Every promise of SECURITY.md names a test, and the test is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_promise_has_its_test() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    promises = re.findall(r"^\| (?!promise|-).+\|$", page, re.MULTILINE)
    assert len(promises) >= 35
    assert all("::test_" in promise for promise in promises)
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
