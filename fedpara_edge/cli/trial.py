"""Trial imports, each in a process of its own, as native code may end the process that imports it."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

LIMIT_SECONDS = 120.0

_IMPORTS = {
    "onnxruntime": "import sys; sys.modules['onnxruntime.training'] = None; import onnxruntime",
    "onnxruntime-training-cpu": "import sys; sys.modules['onnxruntime.training'] = None; import onnxruntime; "
    "from onnxruntime.capi._pybind_state import Module",
    "pillow": "import PIL.Image",
    "pyarrow": "import pyarrow.parquet",
}
"""What to run for a distribution whose module does not have its name, or brings torch along."""


@functools.cache
def why_not_imported(distribution: str, *, limit_seconds: float = LIMIT_SECONDS) -> str:
    """The reason why a distribution that is installed can't be imported; empty if it can.

    Args:
        distribution: Name of the distribution.
        limit_seconds: Time after which the import counts as failed.

    >>> why_not_imported("numpy"), why_not_imported("nosuch")
    ('', "ModuleNotFoundError: No module named 'nosuch'")
    """
    code = _IMPORTS.get(distribution, f"import {distribution.replace('-', '_')}")
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit_seconds:g} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"it ends Python with {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def faults(distributions: Iterable[str]) -> dict[str, str]:
    """Reasons why some distributions can't be imported, by name; those that can are left out."""
    names = tuple(distributions)
    with ThreadPoolExecutor() as pool:
        return {name: fault for name, fault in zip(names, pool.map(why_not_imported, names), strict=True) if fault}
