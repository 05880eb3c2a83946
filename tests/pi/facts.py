"""What a device says about itself, as JSON; runs on it, with its Python and nothing else."""

import importlib.util
import json
import platform
import re
from importlib import metadata
from pathlib import Path

BOARD = Path("/proc/device-tree/model")
CPU = Path("/proc/cpuinfo")


def model() -> str:
    """Which machine this is: what the board says, or under an emulator without one, the CPU."""
    if BOARD.exists():
        return BOARD.read_text().rstrip("\0")
    named = re.search(r"^Model\s*: (.*)$", CPU.read_text(), re.MULTILINE)
    return named[1] if named else "unknown"


if __name__ == "__main__":
    facts = {
        "model": model(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": metadata.version("onnxruntime"),
        "importable": [name for name in ("torch", "onnx", "fedpara_edge") if importlib.util.find_spec(name)],
        "network": str(Path("/proc/self/ns/net").readlink()),
        "interfaces": sorted(entry.name for entry in Path("/sys/class/net").iterdir()),
        "files": sorted(entry.name for entry in Path("/var/tmp").iterdir()),
    }
    print(json.dumps(facts))
