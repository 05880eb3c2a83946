"""Graph files, which are ONNX models, as a runtime may load them: whole, self-contained, and made of known operators.

A graph is a program from elsewhere. ONNX lets it name files of the machine to read its constants from (external data),
bring functions and subgraphs of its own, and call operators that read files (`EPContext`). So before a runtime sees a
graph, its bytes are read here, without onnx or onnxruntime, and only what this project writes is let through:

- models with a graph, metadata and opset imports, without functions, training information and device configurations;
- graphs with nodes and dense constants that lie in the file itself, without sparse and quantized ones;
- operators of ONNX's own domain, with subgraphs in `If` and `Scan` alone, at most `MAX_DEPTH` deep; in files of
  onnxruntime-training also its gradients and the operators that they need;
- names in UTF-8.

The field numbers are those of onnx.proto. A field that is none of them is refused as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedpara_edge.errors import brief, brief_text
from fedpara_edge.storage.protobuf import fields
from fedpara_edge.storage.wholefile import read_whole

MAX_BYTES = (1 << 31) - 1
"""Largest size of a protobuf message."""
MAX_DEPTH = 4

_Value = int | memoryview
_Check = Callable[[_Value], object]


def read_graph(path: Path, *, training: bool = False) -> bytes:
    """Content of a graph file, after `check_graph`.

    Raises:
        ValueError: `check_graph` refuses it.
        OSError: The file can't be read, or is too large.
    """
    content = read_content(path)
    check_graph(content, training=training)
    return content


def read_content(path: Path) -> bytes:
    """Content of a file that may be a graph.

    Raises:
        OSError: The file can't be read, or is too large for one.
    """
    return read_whole(path, max_bytes=MAX_BYTES)


def check_graph(content: bytes, *, training: bool = False) -> None:
    """Check that a serialized ONNX model has only what this project writes, as the module says.

    Args:
        content: Serialized model.
        training: Whether operators of onnxruntime-training are allowed.

    Raises:
        ValueError: It has something else, which the message names.
    """
    if not content:
        raise ValueError("an empty file")
    allowed = {"": None, "ai.onnx": None, **({"com.microsoft": _OF_TRAINING} if training else {})}
    _Reader(allowed).model(memoryview(content))


_OF_TRAINING = re.compile(
    r"\w+Grad(_13|_dX)?|\w+Training|(Bias|Bitmask|BitmaskBias)Dropout|(Bias|Fast|BiasFast|Quick)?Gelu|BiasSoftmax|"
    r"FusedMatMul|TransposeMatMul|Scale|BroadcastGradientArgs|BatchNormInternal|SoftmaxCrossEntropyLossInternal|"
    r"InPlaceAccumulatorV2|AdamWOptimizer|SGDOptimizerV2"
)
"""Operators of the domain com.microsoft in the files of onnxruntime-training, none of which reads a file."""
_WITH_SUBGRAPHS = ("If", "Scan")


@dataclass(frozen=True)
class _Reader:
    """Reader of the messages of onnx.proto, each of which lists the fields that it may have.

    Args:
        operators: Patterns of the allowed operators by domain; None for all.
    """

    operators: Mapping[str, re.Pattern[str] | None]

    def model(self, message: _Value) -> None:
        """Check a ModelProto."""
        self._check(
            "model",
            message,
            {
                **dict.fromkeys((1, 5), _number),  # IR version, model version
                **dict.fromkeys((2, 3, 4, 6), _skip),  # producer, its version, domain, documentation
                7: self.graph,
                **dict.fromkeys((8, 14), _skip),  # opset imports, metadata
                20: _refuse("training information"),
                25: _refuse("a function"),
            },
        )

    def graph(self, message: _Value, depth: int = 0) -> None:
        """Check a GraphProto, `depth` subgraphs deep."""
        if depth > MAX_DEPTH:
            raise ValueError(f"subgraphs more than {MAX_DEPTH} deep")
        self._check(
            "graph",
            message,
            {
                1: partial(self.node, depth=depth),
                2: _text,
                5: self.tensor,
                **dict.fromkeys((10, 13, 16), _skip),  # documentation, shapes, metadata
                **dict.fromkeys((11, 12), self.value),  # inputs, outputs
                14: _refuse("a quantization annotation"),
                15: _refuse("a sparse constant"),
            },
        )

    def value(self, message: _Value) -> None:
        """Check the name of a ValueInfoProto."""
        self._check("value", message, {1: _text, **dict.fromkeys((2, 3, 4), _skip)})

    def node(self, message: _Value, depth: int) -> None:
        """Check a NodeProto of a graph `depth` subgraphs deep."""
        operators: set[str] = set()
        domains: set[str] = set()
        attributes: list[_Value] = []
        self._check(
            "node",
            message,
            {
                **dict.fromkeys((1, 2, 3, 8), _text),  # inputs, outputs, name, overload
                4: lambda value: operators.add(_text(value)),
                5: attributes.append,
                **dict.fromkeys((6, 9), _skip),  # documentation, metadata
                7: lambda value: domains.add(_text(value)),
            },
        )
        if len(operators) > 1 or len(domains) > 1:
            raise ValueError(f"a node of several operators ({brief(sorted(operators | domains))})")
        operator, domain = "".join(operators), "".join(domains)
        pattern = self.operators.get(domain, re.compile("(?!)"))
        if pattern is not None and not pattern.fullmatch(operator):
            raise ValueError(f"operator {brief_text(operator)} of domain {brief(domain)}")
        subgraph = partial(self.graph, depth=depth + 1) if operator in _WITH_SUBGRAPHS else None
        for attribute in attributes:
            self.attribute(attribute, operator, subgraph)

    def attribute(self, message: _Value, operator: str, subgraph: _Check | None) -> None:
        """Check an AttributeProto of an operator; one with a graph only if there is a check for subgraphs."""
        self._check(
            "attribute",
            message,
            {
                1: _text,
                **dict.fromkeys((2, 3, 4, 7, 8, 9, 13, 20), _skip),  # numbers and texts, documentation, type
                **dict.fromkeys((5, 10), self.tensor),
                6: subgraph or _refuse(f"a subgraph in operator {brief_text(operator)}"),
            },
        )

    def tensor(self, message: _Value) -> None:
        """Check a TensorProto, whose values must lie in the message itself."""
        names: list[str] = []
        try:
            self._check(
                "constant",
                message,
                {
                    **dict.fromkeys((1, 2), _skip),  # sizes, type
                    **dict.fromkeys((4, 5, 7, 9, 10, 11), _skip),  # values
                    8: lambda value: names.append(_text(value)),
                    **dict.fromkeys((12, 16), _skip),  # documentation, metadata
                    13: _refuse("data in another file"),
                    14: _located,
                },
            )
        except ValueError as fault:
            named = f" ({brief_text(names[-1])})" if names else ""
            raise ValueError(f"a constant{named} with {fault}") from fault

    @staticmethod
    def _check(kind: str, message: _Value, checks: Mapping[int, _Check]) -> None:
        if isinstance(message, int):
            raise ValueError(f"a number in place of a {kind}")
        for number, value in fields(message):
            check = checks.get(number)
            if check is None:
                raise ValueError(f"the unknown field {number} in a message of kind {kind}")
            check(value)


def _skip(_: _Value) -> None:
    """Let a value through that leads nowhere."""


def _number(value: _Value) -> None:
    if not isinstance(value, int):
        raise ValueError("bytes in place of a number")


def _text(value: _Value) -> str:
    if isinstance(value, int):
        raise ValueError("a number in place of a name")
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as fault:
        raise ValueError(f"a name that is not UTF-8 ({brief(bytes(value))})") from fault


def _located(value: _Value) -> None:
    if value != 0:
        raise ValueError("data in another file")


def _refuse(what: str) -> _Check:
    def check(_: _Value) -> None:
        raise ValueError(what)

    return check
