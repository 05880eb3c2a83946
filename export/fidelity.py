"""Distance of fitted factors from the pretrained model that they stand for, on real examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.forward.preprocess import Deployed
from fedpara_edge.errors import counted
from fedpara_edge.formats.accuracy import count_correct
from fedpara_edge.formats.interface import Interface

_EXAMPLES, _BATCH = 512, 64

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Distance of a model with fitted factors from the dense one.

    Args:
        module: New module at whose input the two are compared; None for the outputs.
        examples: Number of examples.
        error: ‖fitted - dense‖ / ‖dense‖ over the examples.
        accuracy: Accuracy of the fitted model, in [0, 1]; None without labels that are classes, at a new module, and
            for several heads.
        dense_accuracy: Accuracy of the dense model, likewise.
    """

    module: str | None
    examples: int
    error: float
    accuracy: float | None
    dense_accuracy: float | None

    def __str__(self) -> str:
        where = "outputs" if self.module is None else f"inputs of the new {self.module!r}"
        line = (
            f"fitted: {where} within {self.error:.3f} (relative) of the dense model's on "
            f"{counted(self.examples, 'example')}"
        )
        if self.accuracy is None or self.dense_accuracy is None:
            return line
        return f"{line}, accuracy {self.accuracy:.2%}, dense {self.dense_accuracy:.2%}"


def compare_fit(
    fitted: Deployed, dense: Deployed, interface: Interface, examples: Arrays, *, new: str | None = None
) -> Fidelity | None:
    """Run both models on evenly spaced examples, without dropout.

    Args:
        fitted: Model whose factors were fitted.
        dense: Model whose weights they were fitted to.
        interface: Interface of both.
        examples: Raw rows of all inputs, and perhaps of labels, by name.
        new: Name of the first new module, whose outputs mean nothing yet; None if there is none.

    Returns:
        Distance; None where the new module is never called, as its weights are read by another.
    """
    count = len(examples[interface.inputs[0].name])
    rows = np.arange(min(count, _EXAMPLES)) * count // min(count, _EXAMPLES)
    inputs = [examples[spec.name][rows].astype(spec.dtype) for spec in interface.inputs]
    found, expected = (_outputs(model, inputs, new) for model in (fitted, dense))
    if not expected:
        return None
    difference = sum(float(np.sum((found[name] - expected[name]) ** 2)) for name in expected)
    norm = sum(float(np.sum(values**2)) for values in expected.values())
    accuracies: list[float | None] = [None, None]
    head, *others = interface.heads
    if new is None and not others and head.label.name in examples and head.loss.labels != "numbers":
        y = examples[head.label.name][rows]
        name = head.output.name if head.output.name in expected else next(iter(expected))
        accuracies = [count_correct(head.loss, outputs[name], y) / y.size for outputs in (found, expected)]
    return Fidelity(
        module=new,
        examples=len(rows),
        error=float(np.sqrt(difference / max(norm, 1e-30))),
        accuracy=accuracies[0],
        dense_accuracy=accuracies[1],
    )


def _outputs(model: Deployed, inputs: list[NDArray[Any]], module: str | None) -> dict[str, NDArray[Any]]:
    """Outputs of a model by name in double precision; or else what goes into one of its modules."""
    seen: list[dict[str, Tensor]] = []

    def look(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append({str(index): value for index, value in enumerate(arguments) if isinstance(value, Tensor)})

    model.eval()
    handle = None if module is None else model.model.get_submodule(module).register_forward_pre_hook(look)
    with torch.no_grad():
        for start in range(0, len(inputs[0]), _BATCH):
            outputs = model.by_name(*(torch.from_numpy(array[start : start + _BATCH]) for array in inputs))
            if handle is None:
                seen.append(outputs)
    if handle is not None:
        handle.remove()
    return {name: np.concatenate([part[name].double().numpy() for part in seen]) for name in seen[0]} if seen else {}
