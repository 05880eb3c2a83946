"""Report on what `convert` did to each weight of a model, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fedpara_edge.factors.compose import attainable_rank, factor_role, factor_shapes
from fedpara_edge.factors.layout import LayerSpec

SAVED_SHARE = 0.5
"""Share of the parameters below which a conversion that saves them is warned of."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Report on one weight after conversion.

    Args:
        name: Dotted module path, or name of a tensor that can't be factored.
        spec: Spec of the layer as it is now; None where this package describes none (grouped, or a subclass).
        reason: Reason why the weight was left as it was; "" if it was factored.
        note: Reason why its form or rank are others than requested; "" if they are not.
        relative_error: ‖W - composed‖_F / ‖W‖_F, for a layer converted with `pretrained=True`.
        entries: Number of trained entries before the conversion.
        entries_after: Number of trained entries after the conversion.
    """

    name: str
    spec: LayerSpec | None
    reason: str = ""
    note: str = ""
    relative_error: float | None = None
    entries: int
    entries_after: int

    def __str__(self) -> str:
        if self.spec is None or self.reason:
            return f"{self.name}: unchanged, {self.entries:,} entries: {self.reason}"
        spec, full = self.spec, min(self.spec.matrix_shape)
        reach = f", {self.note}" if self.note else ""
        if attainable_rank(spec) < full:
            reach += f", rank of the weight at most {attainable_rank(spec)} of {full}"
        error = "" if self.relative_error is None else f", relative error {self.relative_error:.3f}"
        counts = f"{self.entries:,} -> {self.entries_after:,} entries"
        return f"{self.name}: {spec.kind} R={spec.rank}, {counts}{reach}{error}"


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Report on the conversion of a model, whose rows add up to all trained parameters.

    Args:
        layers: Reports on every weight, and on every other tensor with at least two dimensions, in the order of the
            model.
        messages: Other changes, one line each.
        vectors: Number of trained entries of biases, normalizations and other vectors before the conversion.
        vectors_after: The same after the conversion.
    """

    layers: tuple[LayerReport, ...]
    messages: tuple[str, ...]
    vectors: int
    vectors_after: int

    @property
    def parameters(self) -> int:
        """Number of trainable entries before the conversion."""
        return self.vectors + sum(layer.entries for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        """Number of trainable entries after the conversion."""
        return self.vectors_after + sum(layer.entries_after for layer in self.layers)

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        """Layers that are now factored."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def unchanged(self) -> tuple[LayerReport, ...]:
        """Weights that were left as they were."""
        return tuple(layer for layer in self.layers if layer.reason)

    @property
    def warning(self) -> str:
        """Warning if less than `SAVED_SHARE` of the parameters need not travel, with what to do; "" otherwise."""
        before, after = self.parameters, self.parameters_after - sum(map(_personal_entries, self.layers))
        if before - after >= SAVED_SHARE * before or any(
            layer.reason in ("already converted", "kind is dense") for layer in self.layers
        ):
            return ""
        largest = max(self.layers, key=lambda layer: layer.entries_after)
        saved, share = (before - after) / before, largest.entries_after / after
        what = f"only {saved:.0%} of the parameters are saved, and {share:.0%} of the others are {largest.name!r}"
        return f"warning: {what}; {_remedy(largest)}"

    def __str__(self) -> str:
        changed = "" if self.vectors_after == self.vectors else f" -> {self.vectors_after:,}"
        vectors = f"biases, normalizations and other vectors: {self.vectors:,}{changed} entries"
        total = f"{self.parameters:,} -> {self.parameters_after:,} parameters"
        warning = [self.warning] if self.warning else []
        return "\n".join([*map(str, self.layers), vectors, *self.messages, total, *warning])


def _personal_entries(layer: LayerReport) -> int:
    """Entries of the factors of a layer that stay on the device."""
    if layer.spec is None:
        return 0
    parts = factor_shapes(layer.spec).items()
    return sum(prod(shape) for part, shape in parts if factor_role(layer.spec, part) == "personal")


def _remedy(largest: LayerReport) -> str:
    """What to do about the weight that most is left of."""
    if not largest.reason:
        return "take a smaller gamma, or send updates through a codec such as int4"
    if largest.reason in ("excluded", "not included"):
        return "include it, or send updates through a codec such as int4"
    return f"{largest.reason}; make it of layers that are factored, or send updates through a codec such as int4"
