"""Robust rules: what takes the place of the mean where some clients may be hostile.

| rule                | takes                                      | options                    | module        |
|---------------------|--------------------------------------------|----------------------------|---------------|
| `mean`              | all changes                                |                            | `mean`        |
| `norm-bounded`      | all, none longer than a bound              | `norm=1`                   | `means`       |
| `centered-clipping` | all, clipped around their middle           | `radius=1`, `iterations=5` | `means`       |
| `geometric-median`  | all, the far ones for less                 | `iterations=100`           | `means`       |
| `krum`              | the one amid its neighbours                | `share=0.2`                | `krum`        |
| `multi-krum`        | most, the loners left out                  | `share=0.2`                | `krum`        |
| `median`            | the middle of each entry                   |                            | `coordinates` |
| `trimmed`           | each entry without its extremes            | `share=0.2`                | `coordinates` |

`rule` has the protocol, `mixing` what can go before a rule, and `geometry` the inner products that most rules need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpara_edge.aggregation.rules.rule import Rule
from fedpara_edge.options import choose
from fedpara_edge.registry import Registry

if TYPE_CHECKING:
    from fedpara_edge.aggregation.rules.mixing import Mixing

RULES: Mapping[str, type[Rule]] = Registry(
    __name__,
    {
        "mean": "mean:Mean",
        "median": "coordinates:Median",
        "trimmed": "coordinates:TrimmedMean",
        "geometric-median": "means:GeometricMedian",
        "krum": "krum:Krum",
        "multi-krum": "krum:MultiKrum",
        "centered-clipping": "means:CenteredClipping",
        "norm-bounded": "means:NormBounded",
    },
)
"""Rules by name."""
MIXINGS: Mapping[str, type[Mixing]] = Registry(
    __name__, {"nnm": "mixing:NearestNeighbours", "bucketing": "mixing:Bucketing"}
)
"""Ways to mix by name."""


def find_rule(text: str) -> Rule:
    """The rule that a user asks for.

    Args:
        text: Name, a key of `RULES`, and options after a colon.

    Raises:
        InputError: There is none of that name, or an option is unknown or out of its range.

    >>> find_rule("trimmed:share=0.1")
    TrimmedMean(share=0.1)
    """
    rule: Rule = choose(RULES, text, key="rule")
    return rule


def find_mixing(text: str) -> Mixing:
    """The way to mix that a user asks for.

    Args:
        text: Name, a key of `MIXINGS`, and options after a colon.

    Raises:
        InputError: There is none of that name, or an option is unknown or out of its range.

    >>> find_mixing("bucketing:size=3")
    Bucketing(size=3, seed=0)
    """
    mixing: Mixing = choose(MIXINGS, text, key="mixing")
    return mixing
