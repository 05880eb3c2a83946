"""The modules of this checkout, for tests of the source itself."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedpara_edge", "export", "device_runtime")


def modules(*folders: str) -> list[Path]:
    """All modules below some folders, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name under which a module is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
