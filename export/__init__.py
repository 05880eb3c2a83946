"""Export of a PyTorch model to a bundle, and of a bundle to a model for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.build import BuiltBundle, make_bundle
    from export.exporter import export_bundle

__all__ = ["BuiltBundle", "export_bundle", "make_bundle"]


def __getattr__(name: str) -> Any:
    """Import the exporter, and torch with it, only when it is used: folding does without."""
    if name in __all__:
        from export import build, exporter

        return getattr(build if name in ("BuiltBundle", "make_bundle") else exporter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
