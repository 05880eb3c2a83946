"""A setting of a federation that can be tried: kind of factors, γ, codec and learning rate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fedpara_edge.factors.layout import Kind

_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one size: a kind with its γ.

    Args:
        kind: Kind of all layers that are factored.
        gamma: γ of the rank schedule; None for dense.
    """

    kind: Kind
    gamma: float | None

    @property
    def name(self) -> str:
        """The family in the name of an arm.

        >>> Family(kind="fedpara", gamma=0.1).name, Family(kind="dense", gamma=None).name
        ('fedpara-0.1', 'dense')
        """
        return self.kind if self.gamma is None else f"{self.kind}-{self.gamma:g}"

    def __str__(self) -> str:
        return self.kind if self.gamma is None else f"{self.kind}, γ {self.gamma:g}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A family with a learning rate, and a codec both ways.

    Args:
        family: Kind and γ.
        lr: Learning rate of the first round.
        codec: Codec of updates and changes as text; None for float32, and whole weights to the devices.
    """

    family: Family
    lr: float
    codec: str | None = None

    @property
    def name(self) -> str:
        """Name of the arm.

        >>> Setting(family=Family(kind="update", gamma=0.1), lr=0.003, codec="uniform:step=2").name
        'update-0.1_lr0.003_uniform-step-2'
        """
        parts = [self.family.name, f"lr{self.lr:g}", *([] if self.codec is None else [self.codec])]
        return _NOT_OF_A_NAME.sub("-", "_".join(parts))

    def table(self, *, drawn: bool) -> dict[str, Any]:
        """The arm's table in a plan, but for its rounds.

        Args:
            drawn: Whether initial weights may come from a seed instead of a download, where a codec is used.
        """
        model: dict[str, Any] = {"kind": self.family.kind}
        if self.family.gamma is not None:
            model["gamma"] = self.family.gamma
        table: dict[str, Any] = {"model": model, "train": {"lr": self.lr}}
        if self.codec is not None:
            table["train"]["codec"] = self.codec
            table["aggregate"] = {"downlink_codec": self.codec}
            if drawn:
                model["initial_codec"] = "drawn"
        return table

    def __str__(self) -> str:
        codec = "" if self.codec is None else f", {self.codec} both ways"
        return f"{self.family}{codec}, lr {self.lr:g}"
