"""The device runtime: trains a bundle and measures the result, with numpy and an engine, without torch."""

from device_runtime.config import TrainConfig
from device_runtime.data import Dataset, open_data, open_inputs
from device_runtime.engines.protocol import Adjustment, Engine
from device_runtime.engines.registry import open_engine
from device_runtime.evaluation import Evaluation, evaluate
from device_runtime.loading import load_weights
from device_runtime.progress import progress_bar
from device_runtime.result import TrainResult
from device_runtime.schedule import Schedule
from device_runtime.training import train
from device_runtime.tuning import Choice, open_tuned

__all__ = [
    "Adjustment",
    "Choice",
    "Dataset",
    "Engine",
    "Evaluation",
    "Schedule",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_weights",
    "open_data",
    "open_engine",
    "open_inputs",
    "open_tuned",
    "progress_bar",
    "train",
]
