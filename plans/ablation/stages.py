"""The settings of an ablation, by stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from variations import Setting, Structure

CIFAR, FASHION = "cifar10-cnn", "fashion-mnist-cnn"
TUNING = (10, 11, 12)


@dataclass(frozen=True)
class Run:
    """A setting that is run with some seeds."""

    plan: str
    structure: Structure
    setting: Setting
    seeds: tuple[int, ...] = TUNING
    rounds: int = 40


DENSE = Structure("dense")
LOWRANK = Structure("lowrank", (12, 21, 36))
FEDPARA = Structure("fedpara", (8, 13, 22))
FEDPARA3 = Structure("fedpara", (12, 22, 41))
MATRIX = Structure("matrix", (8, 12, 16))
UPDATE = Structure("update", (7, 11, 18))
UPDATE_QUARTER = Structure("update", (2, 3, 5))
UPDATE_LARGE = Structure("update", (13, 24, 43))
FEDPARA_SGD, UPDATE_SGD = replace(FEDPARA, optimizer="sgd"), replace(UPDATE, optimizer="sgd")
DENSE_SGD, LOWRANK_SGD = replace(DENSE, optimizer="sgd"), replace(LOWRANK, optimizer="sgd")


def runs(structure: Structure, *settings: dict[str, Any], plan: str = CIFAR, **common: Any) -> list[Run]:
    """Runs of one structure, by the options in which their settings differ."""
    of_run = {name: common.pop(name) for name in ("seeds", "rounds") if name in common}
    return [Run(plan, structure, Setting(**{**common, **setting}), **of_run) for setting in settings]


def grid(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination of some options' values."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


SHORT = {"rounds": 20, "decay": 0.94}
"""Half the rounds of the plan, down to the same rate."""
PLAIN, MOMENTUM = grid(lr=(0.05, 0.1, 0.2, 0.4)), grid(lr=(0.005, 0.01, 0.02, 0.04), momentum=(0.9,))
FIRST = [
    runs(
        DENSE, *grid(lr=(0.0005, 0.001, 0.0015, 0.002, 0.003)), *grid(beta=(0.6,), lr=(0.0005, 0.001, 0.002)), **SHORT
    ),
    runs(
        UPDATE,
        *grid(lr=(0.0015, 0.003, 0.005)),
        *grid(scale=(2.0,), lr=(0.001, 0.0015, 0.003)),
        *grid(scale=(0.5,), lr=(0.004, 0.008)),
        **SHORT,
    ),
    runs(
        UPDATE,
        *grid(how=("normal", "signs", "orthogonal"), lr=(0.003,)),
        *grid(masked=(False,), lr=(0.003,)),
        *grid(reset_every=(2, 4), lr=(0.003,)),
        *grid(known=(0.5,), masked=(True, False), lr=(0.003,)),
        **SHORT,
    ),
    runs(
        UPDATE,
        *grid(base_beta=(0.4, 0.6, 0.8), beta=(0.6,), lr=(0.0015, 0.003)),
        *grid(beta=(0.6,), lr=(0.0015, 0.003)),
        **SHORT,
    ),
    runs(
        FEDPARA,
        *grid(lr=(0.001, 0.002, 0.003, 0.004, 0.006)),
        *grid(beta=(0.6,), lr=(0.001, 0.002, 0.004)),
        **SHORT,
    ),
    runs(
        LOWRANK, *grid(lr=(0.001, 0.0015, 0.002, 0.003, 0.004, 0.006)), *grid(beta=(0.6,), lr=(0.001, 0.002)), **SHORT
    ),
    runs(UPDATE, *grid(lr=(0.0015, 0.003, 0.005, 0.008)), *grid(beta=(0.6,), lr=(0.001,)), **SHORT, plan=FASHION)
    + runs(UPDATE, *grid(base_beta=(0.6,), beta=(0.6,), lr=(0.0015, 0.003, 0.005)), **SHORT, plan=FASHION),
    runs(
        DENSE,
        *grid(lr=(0.0005, 0.001, 0.002, 0.004)),
        *grid(beta=(0.6,), lr=(0.0005, 0.001, 0.002, 0.004)),
        **SHORT,
        plan=FASHION,
    ),
    runs(DENSE_SGD, *PLAIN, *MOMENTUM, **SHORT),
    runs(UPDATE_SGD, *PLAIN, *MOMENTUM, **SHORT),
    runs(FEDPARA_SGD, *PLAIN, *MOMENTUM, **SHORT),
    runs(
        FEDPARA,
        *grid(frobenius=(1e-3, 1e-2), weight_decay=(0.0,), lr=(0.002, 0.004)),
        *grid(fedexp=(True,), lr=(0.001, 0.002)),
        *grid(beta=(0.4,), lr=(0.002, 0.004)),
        **SHORT,
    ),
    runs(
        UPDATE_LARGE,
        *grid(lr=(0.0015, 0.003, 0.005)),
        *grid(base_beta=(0.6,), beta=(0.6,), lr=(0.0015, 0.003)),
        **SHORT,
    )
    + runs(
        UPDATE_LARGE, *grid(scale=(2.0,), lr=(0.0015,)), *grid(known=(0.5,), masked=(True, False), lr=(0.003,)), **SHORT
    ),
    runs(
        FEDPARA,
        *grid(lr=(0.001, 0.002, 0.004, 0.006)),
        *grid(beta=(0.6,), lr=(0.001, 0.002, 0.004, 0.006)),
        **SHORT,
        plan=FASHION,
    ),
    runs(
        UPDATE_QUARTER,
        *grid(lr=(0.0015, 0.003, 0.005)),
        *grid(base_beta=(0.6,), beta=(0.6,), lr=(0.0015, 0.003)),
        **SHORT,
    )
    + runs(
        UPDATE_QUARTER,
        *grid(scale=(2.0,), lr=(0.003,)),
        *grid(known=(0.5,), masked=(True, False), lr=(0.003,)),
        **SHORT,
    ),
    runs(
        FEDPARA3, *grid(lr=(0.001, 0.002, 0.003, 0.004, 0.006)), *grid(beta=(0.6,), lr=(0.001, 0.002, 0.004)), **SHORT
    ),
    runs(
        replace(FEDPARA_SGD, preconditioned=True),
        *grid(lr=(0.01, 0.03, 0.1, 0.3)),
        *grid(momentum=(0.9,), lr=(0.001, 0.003, 0.01, 0.03)),
        **SHORT,
    ),
    runs(
        replace(FEDPARA, cyclic=True),
        *grid(lr=(0.002, 0.004, 0.008, 0.016)),
        *grid(beta=(0.4,), lr=(0.002, 0.004, 0.008, 0.016)),
        **SHORT,
    ),
    runs(
        replace(FEDPARA3, cyclic=True),
        *grid(lr=(0.002, 0.004, 0.008, 0.016)),
        *grid(beta=(0.4,), lr=(0.002, 0.004, 0.008, 0.016)),
        **SHORT,
    ),
    runs(
        MATRIX,
        *grid(lr=(0.001, 0.002, 0.003, 0.004, 0.006)),
        *grid(frobenius=(1e-2,), weight_decay=(0.0,), lr=(0.002, 0.004, 0.006)),
        **SHORT,
    ),
    runs(DENSE, *grid(beta=(0.4, 0.8), lr=(0.0005, 0.001, 0.0015)), *grid(fedexp=(True,), lr=(0.001, 0.0005)), **SHORT),
    runs(LOWRANK_SGD, *PLAIN, *MOMENTUM, **SHORT),
]
SERVER = [
    runs(
        UPDATE,
        *grid(eta=(1.5, 2.0, 3.0), lr=(0.00075, 0.0015), scale=(2.0,)),
        *grid(base_beta=(0.6,), beta=(0.6,), lr=(0.00075, 0.0015), scale=(2.0,)),
        **SHORT,
    ),
    runs(DENSE, *grid(eta=(1.5, 2.0, 3.0), lr=(0.0005, 0.001)), *grid(beta=(0.8,), lr=(0.0005, 0.00025)), **SHORT),
    runs(
        FEDPARA,
        *grid(eta=(1.5, 2.0), lr=(0.001, 0.002)),
        *grid(frobenius=(1e-2,), weight_decay=(0.0,), beta=(0.0, 0.6), lr=(0.002,)),
        *grid(fedexp=(True,), lr=(0.001,)),
        *grid(beta=(0.8,), lr=(0.001,)),
        **SHORT,
    ),
    runs(LOWRANK, *grid(lr=(0.001, 0.002, 0.003, 0.004)), *grid(beta=(0.6,), lr=(0.001, 0.002)), **SHORT)
    + runs(LOWRANK, *grid(eta=(2.0,), lr=(0.001, 0.002)), **SHORT),
    runs(UPDATE_SGD, *PLAIN, *grid(scale=(2.0,), lr=(0.05, 0.1)), *grid(momentum=(0.9,), lr=(0.01, 0.02)), **SHORT),
    runs(DENSE_SGD, *PLAIN, *MOMENTUM, **SHORT),
    runs(
        UPDATE,
        *grid(lr=(0.0005, 0.001, 0.002), scale=(2.0,)),
        *grid(eta=(2.0,), lr=(0.0005, 0.001, 0.002), scale=(2.0,)),
        *grid(base_beta=(0.6,), beta=(0.6,), lr=(0.001, 0.002), scale=(2.0,)),
        **SHORT,
        plan=FASHION,
    ),
    FIRST[7],
    runs(
        UPDATE_QUARTER,
        *grid(lr=(0.001, 0.0015, 0.003), scale=(2.0,)),
        *grid(eta=(2.0,), lr=(0.00075, 0.0015), scale=(2.0,)),
        *grid(base_beta=(0.6,), beta=(0.6,), lr=(0.00075, 0.0015, 0.003), scale=(2.0,)),
        **SHORT,
    ),
    *FIRST[10:12],
    *FIRST[15:20],
]
ONCE = {"seeds": TUNING[:1], **SHORT}
"""One seed, for a CPU."""
CYCLIC, PRECONDITIONED = replace(FEDPARA, cyclic=True), replace(FEDPARA_SGD, preconditioned=True)
FOLDED = {"base_beta": 0.6, "beta": 0.6, "scale": 2.0}
REST = [
    *(runs(structure, {"lr": 0.1}, **ONCE) for structure in (DENSE_SGD, FEDPARA_SGD, UPDATE_SGD)),
    *(runs(structure, {"lr": 0.002}, **ONCE) for structure in (LOWRANK, MATRIX)),
    runs(FEDPARA, *grid(frobenius=(1e-2, 1e-3), weight_decay=(0.0,), lr=(0.002,)), **ONCE),
    runs(CYCLIC, {"lr": 0.004}, **ONCE),
    runs(PRECONDITIONED, {"lr": 0.03}, **ONCE),
    runs(UPDATE_QUARTER, {**FOLDED, "lr": 0.0015}, **ONCE),
    *(
        runs(structure, {"lr": 0.02, "momentum": 0.9}, {"lr": 0.01, "momentum": 0.9}, {"lr": 0.2}, **ONCE)
        for structure in (DENSE_SGD, FEDPARA_SGD, UPDATE_SGD)
    ),
    *(runs(structure, {"lr": 0.004}, {"lr": 0.001}, **ONCE) for structure in (LOWRANK, MATRIX)),
    runs(LOWRANK, {"lr": 0.002, "beta": 0.6}, **ONCE),
    runs(FEDPARA, {"lr": 0.002, "fedexp": True}, **ONCE),
    runs(CYCLIC, {"lr": 0.008}, **ONCE),
    runs(PRECONDITIONED, {"lr": 0.1}, {"lr": 0.003, "momentum": 0.9}, {"lr": 0.01, "momentum": 0.9}, **ONCE),
    runs(UPDATE_QUARTER, {"lr": 0.003}, **ONCE),
]
HYBRIDS = [replace(FEDPARA, ranks=ranks) for ranks in ((0, 13, 22), (8, 0, 22), (8, 13, 0))]
WARM = [replace(FEDPARA, warm_up=rounds) for rounds in (2, 5)]
WIDE = replace(FEDPARA, ranks=(8, 12, 16), width=2)
"""Twice the channels at γ 0."""
MODELS = [
    *(runs(structure, {"lr": 0.003}, **ONCE) for structure in (*HYBRIDS, *WARM, WIDE)),
    runs(FEDPARA, *grid(frobenius=(1e-2,), weight_decay=(0.0,), lr=(0.002, 0.003, 0.004)), **SHORT),
    runs(DENSE, {"lr": 0.001, "fedexp": True}, **ONCE),
    runs(HYBRIDS[0], {"lr": 0.002}, **SHORT),
    *(runs(structure, {"lr": 0.002}, **ONCE) for structure in (*HYBRIDS[1:], *WARM, WIDE)),
]
"""Which layers are factored, how wide they are, and what they begin with."""
STAGES: dict[str, list[Run]] = {
    "models": [run for batch in MODELS for run in batch],
    "rest": [run for batch in REST for run in batch],
    "server": [run for batch in SERVER for run in batch],
    "first": [run for batch in FIRST for run in batch],
}
