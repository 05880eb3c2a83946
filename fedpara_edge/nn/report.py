"""Report on what `convert` did to each layer of a model, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass

from fedpara_edge.factors.compose import attainable_rank, factor_count
from fedpara_edge.factors.layout import LayerSpec


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Report on one layer after conversion.

    Args:
        name: Dotted module path.
        spec: Spec of the layer as it is now; None where this package describes none (grouped, or a subclass).
        reason: Reason why the layer was left as it was; "" if it was converted.
        note: Reason why its form or rank are others than requested; "" if they are not.
        relative_error: ‖W - composed‖_F / ‖W‖_F, for a layer converted with `pretrained=True`.
    """

    name: str
    spec: LayerSpec | None
    reason: str = ""
    note: str = ""
    relative_error: float | None = None

    def __str__(self) -> str:
        if self.spec is None or self.reason:
            return f"{self.name}: unchanged: {self.reason}"
        spec, full = self.spec, min(self.spec.matrix_shape)
        reach = f", {self.note}" if self.note else ""
        if attainable_rank(spec) < full:
            reach += f", rank of the weight at most {attainable_rank(spec)} of {full}"
        error = "" if self.relative_error is None else f", relative error {self.relative_error:.3f}"
        counts = f"{spec.dense_parameters:,} -> {factor_count(spec):,} entries"
        return f"{self.name}: {spec.kind} R={spec.rank}, {counts}{reach}{error}"


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Report on the conversion of a model.

    Args:
        layers: Reports on every linear and convolution layer and recurrent weight, in the order of the model.
        messages: Other changes, one line each.
        parameters: Number of trainable entries before the conversion.
        parameters_after: Number of trainable entries after the conversion.
    """

    layers: tuple[LayerReport, ...]
    messages: tuple[str, ...]
    parameters: int
    parameters_after: int

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        """Layers that are now factored."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def unchanged(self) -> tuple[LayerReport, ...]:
        """Layers that were left as they were."""
        return tuple(layer for layer in self.layers if layer.reason)

    def __str__(self) -> str:
        total = f"{self.parameters:,} -> {self.parameters_after:,} parameters"
        return "\n".join([*map(str, self.layers), *self.messages, total])
