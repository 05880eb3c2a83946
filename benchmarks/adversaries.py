"""What hostile clients send: each attack makes update files of the honest clients' updates, as its paper has it.

With x_i the changes that the n honest clients make in a round, μ and σ their mean and standard deviation in each entry,
and y_a what the hostile client a itself would send if it were honest:

| attack         | every hostile client sends                     | source                                           |
|----------------|------------------------------------------------|--------------------------------------------------|
| `sign-flip`    | -y_a                                           | Li et al. 2019, arXiv 1811.03761                 |
| `scaling`      | -10 y_a                                        | Bagdasaryan et al. 2018, arXiv 1807.00459        |
| `alie`         | μ - 1.5 σ, within the honest spread            | Baruch et al. 2019, arXiv 1902.06156             |
| `ipm`          | -0.1 μ, nearer to all than they are to another | Xie et al. 2019, arXiv 1903.03936                |
| `label-flip`   | what labels 9 - y of its own examples lead to  | Tolpekin et al. 2020, arXiv 2007.08432           |
| `gaussian`     | numbers of N(0, 1)                             | Blanchard et al. 2017, arXiv 1703.02757          |
| `impersonate`  | -y_a, and as much under each honest name       | so that those conflict and are refused           |
| `gauge`        | X -> -X, Y -> -Y for every pair of factors     | what no composed weight shows, and ruins a mean  |

The attackers know all honest updates, collude, and choose no attack by the rule. Scaling has the sign that destroys and
the factor of the project's own trials. In `alie` the paper's formula for the multiple of σ gives less for few clients
(0 to 0.4 here); 1.5 is that of its experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.weights import Weights

Change = Mapping[str, NDArray[np.float32]]
SCALE, ALIE_Z, IPM_EPSILON, DEVIATION = 10.0, 1.5, 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an attacker knows when it writes its update.

    Args:
        honest: Changes of the honest clients.
        own: Change that the attacker's own training led to; empty if it does not train.
        weights: Weights of the round.
        random: Generator for this attacker and round.
    """

    honest: list[Change]
    own: Change
    weights: Weights
    random: np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack.

    Args:
        craft: Function from what is known to the change that is sent.
        own: Whether the attackers train too.
        flips_labels: Whether they do so on wrong labels.
        impersonates: Whether they send an update under every honest name as well.
    """

    craft: Callable[[Scene], Change]
    own: bool = False
    flips_labels: bool = False
    impersonates: bool = False


def own_times(factor: float) -> Callable[[Scene], Change]:
    """The own change times a factor."""
    return lambda scene: {name: np.float32(factor) * values for name, values in scene.own.items()}


def alie(scene: Scene) -> Change:
    """μ - z σ with the standard deviation over the honest, in each entry."""
    stacked = _stacked(scene.honest)
    return {name: np.float32(rows.mean(axis=0) - ALIE_Z * rows.std(axis=0, ddof=1)) for name, rows in stacked.items()}


def inner_product_manipulation(scene: Scene) -> Change:
    """-ε μ."""
    return {name: np.float32(-IPM_EPSILON * rows.mean(axis=0)) for name, rows in _stacked(scene.honest).items()}


def gaussian(scene: Scene) -> Change:
    """Noise."""
    shapes = {name: values.shape for name, values in scene.weights.tensors.items()}
    return {name: np.float32(scene.random.normal(0, DEVIATION, shape)) for name, shape in shapes.items()}


def gauge(scene: Scene) -> Change:
    """The change to factors with two of each product negated, which compose to the weights of the round."""
    negated = negated_factors(scene.weights.layout)
    return {name: np.float32(-2 if name in negated else 0) * values for name, values in scene.weights.tensors.items()}


def negated_factors(layout: Layout) -> frozenset[str]:
    """Names of the factors X and Y, of which every product has one of each.

    A term of the tensor form has a core besides, and one of the matrix form nothing else.
    """
    return frozenset(tensor.name for tensor in layout.shared if tensor.part[:1] in ("x", "y"))


def _stacked(changes: list[Change]) -> dict[str, NDArray[np.float64]]:
    """Changes of all, float64 [clients, *shape] by name."""
    return {name: np.stack([np.float64(change[name]) for change in changes]) for name in changes[0]}


ATTACKS: Mapping[str, Attack] = {
    "sign-flip": Attack(craft=own_times(-1), own=True),
    "scaling": Attack(craft=own_times(-SCALE), own=True),
    "alie": Attack(craft=alie),
    "ipm": Attack(craft=inner_product_manipulation),
    "label-flip": Attack(craft=own_times(1), own=True, flips_labels=True),
    "gaussian": Attack(craft=gaussian),
    "impersonate": Attack(craft=own_times(-1), own=True, impersonates=True),
    "gauge": Attack(craft=gauge),
}
"""The attacks by name."""
