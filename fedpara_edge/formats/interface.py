"""The interface of a model: the arrays that it takes, those that it gives, and what each is trained on.

It stands in the manifest of a bundle and in a folded model. A model of one input and one output, trained with a loss
without options, has

    input         {"name", "shape" without the batch, "dtype", "classes" or null}
    label         the same, of the label
    output        {"name", "shape" without the batch, "dtype", "classes": null}
    loss          cross_entropy, mse or bce

Any other model has, in place of these,

    inputs        list of such arrays, in the order of the graphs
    heads         list of {"output", "label", "loss"}: what is trained
    others        list of further outputs, which are only predicted, if there are any

with a loss as it is typed (`fedpara_edge.losses`), and beside the classes of an array their `class_names`, if they have
names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fedpara_edge.errors import brief, brief_text

if TYPE_CHECKING:
    from fedpara_edge.losses import Loss

DTYPES = ("uint8", "float32", "int64", "bool")
"""Dtypes that an array can have."""
_MAX_ENTRIES = _MAX_CLASSES = 1 << 31
"""Bounds on what one example may take, and on the classes of a label: beyond them, somebody means harm."""
_FIRST_LOSSES = ("cross_entropy", "mse", "bce")


def is_text(found: Any) -> bool:
    """Whether a value from JSON is text that has bytes in UTF-8."""
    try:
        return isinstance(found, str) and found.encode() is not None
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True)
class ArraySpec:
    """Description of an input, a label or an output of a model.

    Args:
        name: Name in the graphs and in data files.
        shape: Shape of one example, without the batch.
        dtype: Name of the numpy dtype.
        classes: Number of classes of a class label, or of tokens of an input, which lie in [0, classes); None for
            anything else.
        class_names: Names of the classes in their order; None if they have only numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(f"{len(self.class_names)} names of {self.classes} classes")

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        if self.class_names is None:
            del data["class_names"]
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ArraySpec:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError: A field is missing or unknown.
            ValueError: A field has an impossible value.
        """
        names, classes = data.get("class_names"), data.get("classes")
        if not isinstance(data["shape"], list) or not is_text(data["dtype"]):
            raise ValueError(f"an array of {brief_text(data['dtype'])} {brief(data['shape'])}")
        if not is_text(data["name"]) or not (
            names is None or (isinstance(names, list) and all(isinstance(each, str) for each in names))
        ):
            raise ValueError(f"an array with the name {brief(data['name'])} and names of classes {brief(names)}")
        if not (classes is None or (type(classes) is int and 0 < classes <= _MAX_CLASSES)):
            raise ValueError(f"an array of {brief(classes)} classes")
        spec = ArraySpec(
            **{**data, "shape": tuple(data["shape"]), "class_names": None if names is None else tuple(names)}
        )
        sizes = all(type(size) is int and size > 0 for size in spec.shape)
        if spec.dtype not in DTYPES or not sizes or math.prod(spec.shape) > _MAX_ENTRIES:
            raise ValueError(f"an array of {brief_text(spec.dtype)} {brief(list(spec.shape))}")
        return spec


@dataclass(frozen=True)
class Head:
    """Output that is trained.

    Args:
        output: Output of the model.
        label: Label of one example for this output.
        loss: Loss of the two.
    """

    output: ArraySpec
    label: ArraySpec
    loss: Loss


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Interface of a model; the module describes how it is stored.

    Args:
        inputs: Inputs, in the order in which the graphs take them.
        heads: Outputs that are trained; the loss is the sum of theirs.
        others: Further outputs, which are only predicted.
    """

    inputs: tuple[ArraySpec, ...]
    heads: tuple[Head, ...]
    others: tuple[ArraySpec, ...] = ()

    @property
    def labels(self) -> tuple[ArraySpec, ...]:
        """Labels of all heads."""
        return tuple(head.label for head in self.heads)

    @property
    def outputs(self) -> tuple[ArraySpec, ...]:
        """All outputs, those that are trained first."""
        return (*(head.output for head in self.heads), *self.others)

    @property
    def is_first(self) -> bool:
        """Whether the first schema of manifests, and of folded models, can describe it."""
        arrays = (*self.inputs, *self.labels, *self.outputs)
        return (
            len(self.inputs) == len(self.heads) == 1
            and not self.others
            and str(self.heads[0].loss) in _FIRST_LOSSES
            and all(array.class_names is None and array.dtype != "bool" for array in arrays)
        )

    def to_json(self) -> dict[str, Any]:
        """Entries for JSON, as the module describes them."""
        if self.is_first:
            head = self.heads[0]
            return {
                "input": self.inputs[0].to_json(),
                "label": head.label.to_json(),
                "output": head.output.to_json(),
                "loss": str(head.loss),
            }
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "heads": [
                {"output": head.output.to_json(), "label": head.label.to_json(), "loss": str(head.loss)}
                for head in self.heads
            ],
            **({"others": [spec.to_json() for spec in self.others]} if self.others else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], *, first: bool) -> Interface:
        """Inverse of `to_json`.

        Args:
            data: Object with the entries, and perhaps others.
            first: Whether they are those of one input, one output and a loss without options.

        Raises:
            KeyError: An entry is missing.
            TypeError: An entry is of another type.
            ValueError: An entry has an impossible value.
            InputError: A loss is unknown.
        """
        from fedpara_edge.losses import find_loss

        heads = [data] if first else data["heads"]
        inputs = [data["input"]] if first else data["inputs"]
        return Interface(
            inputs=tuple(ArraySpec.from_json(spec) for spec in inputs),
            heads=tuple(
                Head(ArraySpec.from_json(head["output"]), ArraySpec.from_json(head["label"]), find_loss(head["loss"]))
                for head in heads
            ),
            others=() if first else tuple(ArraySpec.from_json(spec) for spec in data.get("others", ())),
        )
