"""Choice of the engine that simulates: the one that the plan names, here or on Flower, or torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.options import check, option

Precision = Literal["float32", "tf32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Engine of a simulation.

    Args:
        engine: `plan` for the one that the plan names, as devices have it; `torch`; or `flower` for the plan's in
            actors of Flower's simulation engine.
        device: Device of torch; None for the CPU.
        precision: Precision of products in torch: `float32`; `tf32`, with factors rounded to 10 bits, on a GPU; `bf16`,
            with activations and composed weights rounded to 7 bits as well. None for float32. The weights that are
            trained and the optimizer are float32 in any case.

    Raises:
        InputError: A value is out of its range, or given for another engine.
    """

    engine: Literal["plan", "torch", "flower"] = option(
        "plan", help="Engine that trains and evaluates: the plan's, torch, or the plan's on Flower's simulation."
    )
    device: Literal["cpu", "cuda"] | None = option(
        None, only=("engine", ("torch",)), unset="cpu", help="Device of torch."
    )
    precision: Precision | None = option(
        None, only=("engine", ("torch",)), unset="float32", help="Precision of products in torch."
    )

    def __post_init__(self) -> None:
        check(self)

    @property
    def name(self) -> str | None:
        """Name with all that decides what is learned, as in `torch:cuda:bf16`; None for the plan's, wherever."""
        return None if self.engine != "torch" else f"torch:{self.device or 'cpu'}:{self.precision or 'float32'}"

    @property
    def on_gpu(self) -> bool:
        """Whether one process trains all clients on a GPU."""
        return self.device == "cuda"


@dataclass(frozen=True, kw_only=True)
class TorchSource:
    """Source of the engine `torch`, besides the bundle.

    Args:
        recipe: Recipe of the bundle.
        choice: Device and precision.
        batch_rows: Rows of a whole micro-batch.
    """

    recipe: Recipe = field(hash=False)
    choice: EngineChoice
    batch_rows: int
