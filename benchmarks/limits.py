"""Limits of a training step on a machine, and the time of its operators.

A step can't take less than its floating-point operations over the rate of a large matrix product. They are counted in
torch, those of convolutions as direct ones: an algorithm with fewer products may go below.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from device_runtime import open_engine
from device_runtime.engines.ort import InferenceSession, session_options
from export.forward.graph import IR_VERSION, OPSET
from fedpara_edge.formats.bundle import ONNXRUNTIME_FILES, Bundle

_SIZE, _RUNS, _WARMUP = 1536, 7, 3


def peak_gflops(threads: int) -> float:
    """Measured rate of a product of two matrices [1536, 1536] in onnxruntime, in 10⁹ operations a second."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [_SIZE, _SIZE]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", infos[:2], infos[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    session = InferenceSession(model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"])
    matrix = np.random.default_rng(0).standard_normal((_SIZE, _SIZE), np.float32)
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        session.run(None, {"a": matrix, "b": matrix})
        seconds.append(time.perf_counter() - started)
    return 2 * _SIZE**3 / min(seconds) / 1e9


def step_gflops(torch_step: Callable[[], object]) -> dict[str, float]:
    """10⁹ operations of a step in torch: those of `convolutions`, and of `other` matrix products."""
    with FlopCounterMode(display=False) as counter:
        torch_step()
    counts: Counter[str] = Counter()
    for operator, operations in counter.get_flop_counts()["Global"].items():
        counts["convolutions" if "convolution" in str(operator) else "other"] += operations
    return {name: counts[name] / 1e9 for name in ("convolutions", "other")}


def operators(
    bundle: Bundle, x: NDArray[Any], y: NDArray[Any], *, threads: int, repetitions: int
) -> list[dict[str, Any]]:
    """Median milliseconds that all nodes of each operator take in a step of `train_step.onnx`, the slowest first.

    Args:
        bundle: Bundle with files of the engine onnxruntime.
        x: Batch of raw inputs.
        y: Labels of the batch.
        threads: Threads for the operators.
        repetitions: Number of steps to take the median of.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = InferenceSession(bundle.file(ONNXRUNTIME_FILES[0]), options, providers=["CPUExecutionProvider"])
        values = _inputs(bundle, x, y)
        for _ in range(_WARMUP + repetitions):
            session.run(None, {entry.name: values[entry.name] for entry in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event["ts"] for event in events if event.get("name") == "model_run"]
    times: list[Counter[str]] = [Counter() for _ in runs]
    nodes: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            run = sum(event["ts"] >= start for start in runs) - 1
            times[run][event["args"]["op_name"]] += event["dur"] / 1000
            nodes[event["args"]["op_name"]] += run == len(runs) - 1
    medians = {name: statistics.median(each[name] for each in times[_WARMUP:]) for name in nodes}
    ordered = sorted(medians, key=lambda name: -medians[name])
    return [{"operator": name, "nodes": nodes[name], "ms": medians[name]} for name in ordered]


def _inputs(bundle: Bundle, x: NDArray[Any], y: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Inputs of `train_step.onnx` of a model with a single input and label, for a plain step."""
    interface, none = bundle.interface, np.zeros(1, np.float32)
    return {
        **open_engine(bundle, "onnxruntime").state(),
        interface.inputs[0].name: x,
        interface.labels[0].name: y,
        **dict.fromkeys(("accumulated", "mu", "h"), none),
        "seed": np.array(0),
        "last": np.array(True),
        "adjusted": np.array(False),
        **{name: np.array(1, np.float32) for name in ("share", "max_norm")},
        "learning_rate": np.array(0.01, np.float32),
    }
