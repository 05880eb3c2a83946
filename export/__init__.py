"""From a PyTorch model to a bundle that devices train (`export_bundle`)."""

from export.exporter import ExportOptions, export_bundle

__all__ = ["ExportOptions", "export_bundle"]
