"""What a search chooses among."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from fedpara_edge.advising.setting import Family
from fedpara_edge.codecs import find_encoder
from fedpara_edge.options import check, option

DENSE = Family(kind="dense", gamma=None)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What to choose among.

    Args:
        points: Points of accuracy below the dense model that may be given up.
        kind: Kinds of factors to try beside the dense model.
        gamma: γ of each kind to try.
        codec: Codecs to try, both ways, beside float32.

    Raises:
        InputError: A value is out of range; the error has its key.
    """

    points: float = option(1.0, minimum=0, help="Points of accuracy below the dense model that may be given up.")
    kind: tuple[str, ...] = option(
        ("fedpara", "update"), choices=("fedpara", "update", "lowrank"), help="Kinds of factors to try."
    )
    gamma: tuple[float, ...] = option((0.1, 0.3), minimum=0, maximum=1, help="γ of the rank schedule to try.")
    codec: tuple[str, ...] = option(("int4", "uniform"), help="Codecs to try, both ways.")

    def __post_init__(self) -> None:
        check(self)
        for codec in self.codec:
            find_encoder(codec)

    @property
    def families(self) -> list[Family]:
        """The dense model, and every kind with every γ."""
        factored = [Family(kind=kind, gamma=gamma) for kind, gamma in itertools.product(self.kind, self.gamma)]  # type: ignore[arg-type]
        return [DENSE, *factored]
