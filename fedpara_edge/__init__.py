"""Train one model on many edge devices over thin links: FedPara factors, their files, and their aggregation.

`__all__` is the public API, from a PyTorch model to the next global weights; `fedpara_edge.nn` has the layers and the
models to start from. Each name is imported when it is first used, so that a server needs neither torch nor onnxruntime
and a device no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedpara_edge._version import __version__ as __version__

if TYPE_CHECKING:
    from device_runtime.config import TrainConfig
    from device_runtime.data import open_data
    from device_runtime.engines.registry import open_engine
    from device_runtime.evaluation import evaluate
    from device_runtime.prediction import predict
    from device_runtime.training import train
    from export.exporter import export_bundle as export
    from export.folding.fold import fold
    from fedpara_edge.aggregation import AggregateConfig, aggregate, run_round
    from fedpara_edge.aggregation.partials import make_partial
    from fedpara_edge.codecs import find_encoder
    from fedpara_edge.errors import (
        BudgetError,
        BusyError,
        DivergedError,
        FedparaError,
        InputError,
        InvalidUpdateError,
        OutputExistsError,
        TooFewUpdatesError,
        TrustError,
        WrongBundleError,
    )
    from fedpara_edge.factors.factorization import Factorization
    from fedpara_edge.formats.bundle import open_bundle
    from fedpara_edge.formats.change import apply_change, publish_change
    from fedpara_edge.formats.recipe import ExportConfig
    from fedpara_edge.formats.weights import read_weights, write_weights
    from fedpara_edge.nn.convert import convert
    from fedpara_edge.report import read_metrics, write_report
    from fedpara_edge.simulation.runner import simulate

_MODULES = {
    "device_runtime.config": "TrainConfig",
    "device_runtime.data": "open_data",
    "device_runtime.engines.registry": "open_engine",
    "device_runtime.evaluation": "evaluate",
    "device_runtime.prediction": "predict",
    "device_runtime.training": "train",
    "export.exporter": "export",
    "export.folding.fold": "fold",
    "fedpara_edge.aggregation": "AggregateConfig aggregate run_round",
    "fedpara_edge.aggregation.partials": "make_partial",
    "fedpara_edge.codecs": "find_encoder",
    "fedpara_edge.errors": "BudgetError BusyError DivergedError FedparaError InputError InvalidUpdateError "
    "OutputExistsError TooFewUpdatesError TrustError WrongBundleError",
    "fedpara_edge.factors.factorization": "Factorization",
    "fedpara_edge.formats.bundle": "open_bundle",
    "fedpara_edge.formats.change": "apply_change publish_change",
    "fedpara_edge.formats.recipe": "ExportConfig",
    "fedpara_edge.formats.weights": "read_weights write_weights",
    "fedpara_edge.nn.convert": "convert",
    "fedpara_edge.report": "read_metrics write_report",
    "fedpara_edge.simulation.runner": "simulate",
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}
"""Module of each name of the public API."""

__all__ = [
    "AggregateConfig",
    "BudgetError",
    "BusyError",
    "DivergedError",
    "ExportConfig",
    "Factorization",
    "FedparaError",
    "InputError",
    "InvalidUpdateError",
    "OutputExistsError",
    "TooFewUpdatesError",
    "TrainConfig",
    "TrustError",
    "WrongBundleError",
    "aggregate",
    "apply_change",
    "convert",
    "evaluate",
    "export",
    "find_encoder",
    "fold",
    "make_partial",
    "open_bundle",
    "open_data",
    "open_engine",
    "predict",
    "publish_change",
    "read_metrics",
    "read_weights",
    "run_round",
    "simulate",
    "train",
    "write_report",
    "write_weights",
]


def __getattr__(name: str) -> Any:
    """Import a name of the public API from the packages of this installation.

    Raises:
        InputError: A package of ours is shadowed by another module of its name.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedpara_edge.installation import OWN_PACKAGES, check_package

    for package in OWN_PACKAGES if _reaches(_PLACES[name]) else ():
        check_package(package)
    module = importlib.import_module(_PLACES[name])
    value = getattr(module, "export_bundle" if name == "export" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public API and the module's own names."""
    return sorted({*globals(), *__all__})


def _reaches(place: str) -> bool:
    """Whether a module, or one that it imports, lies in a package beside this one."""
    return not place.startswith("fedpara_edge.") or place.startswith(("fedpara_edge.report", "fedpara_edge.simulation"))
