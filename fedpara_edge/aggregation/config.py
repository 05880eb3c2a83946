"""How a server aggregates a round: `AggregateConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedpara_edge.aggregation.bounds import Bounds
from fedpara_edge.aggregation.rules import MIXINGS, RULES, find_mixing, find_rule
from fedpara_edge.aggregation.rules.method import Method, Space
from fedpara_edge.algorithms import SERVER, ServerAlgorithm, Weighting, find_server
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import InputError
from fedpara_edge.options import check, declared, option

if TYPE_CHECKING:
    from fedpara_edge.codecs.codec import Encoder
    from fedpara_edge.privacy.mechanism import Gaussian

COUNTING = ("scaffold", "feddyn")
"""Algorithms that need the number of all clients, which is an option of theirs."""

Merge = Literal["mean", "refit"]


@dataclass(frozen=True, kw_only=True)
class AggregateConfig(Bounds):
    """How updates become the next weights, with the bounds of each (`bounds`).

    Args:
        algorithm: Server algorithm with its options, such as `fedadam:lr=0.01` (`fedpara_edge.algorithms`).
        clients: Number of all clients of the federation, for the algorithms that need it.
        weighting: Weighting of the updates in the mean; None for the algorithm's own.
        merge: `mean` for the mean of the factors, `refit` for factors closer to the mean of the composed
            weights.
        rule: Rule that combines the updates, with its options, such as `trimmed:share=0.1` (`aggregation.rules`).
        mixing: Mixing in front of the rule, with its options, such as `bucketing:size=2`; None for none.
        space: Space in which the rule measures distances.
        privacy: Noise on the mean, with its options and its budget, such as
            `gaussian:clip=1,noise=1.1,expected=100,epsilon=8,delta=1e-5` (`fedpara_edge.privacy`); None for none.
        downlink_codec: Codec of the change that is published for devices that have the weights before; None to publish
            whole weights.
        exact: Whether to sum without rounding, as partials of a round are summed (`aggregation.exact`).
        max_staleness: Most rounds by which an update may be late; its change is discounted (`aggregation.staleness`).
        min_updates: Number of valid updates below which no weights are written.
        strict: Whether to stop at the first invalid update instead of leaving it out.

    Raises:
        InputError: A value is out of its range, or two don't go together; `key` is the option at fault.
    """

    algorithm: str = option(
        "fedavg",
        metavar="NAME[:OPTION=VALUE,…]",
        help=f"Server algorithm: {', '.join(SERVER)}; with its options, such as fedadam:lr=0.01.",
    )
    clients: int | None = option(None, minimum=1, help=f"Number of all clients; {' and '.join(COUNTING)} need it.")
    weighting: Weighting | None = option(
        None, unset="equal for scaffold and feddyn, else by examples", help="Weighting of the updates in the mean."
    )
    merge: Merge = option(
        "mean", help="Mean of the factors, or factors refitted to the mean of the weights they compose to."
    )
    rule: str = option(
        "mean",
        metavar="NAME[:OPTION=VALUE,…]",
        help=f"Rule that combines the updates: {', '.join(RULES)}; with its options, such as trimmed:share=0.1.",
    )
    mixing: str | None = option(
        None,
        metavar="NAME[:OPTION=VALUE,…]",
        unset="none",
        help=f"Mixing of the updates before the rule: {' or '.join(MIXINGS)}.",
    )
    space: Space = option("factors", help="Space in which a rule measures distances: factors, or composed weights.")
    privacy: str | None = option(
        None,
        metavar="NAME:OPTION=VALUE,…",
        unset="none",
        help="Noise on the mean for differential privacy, with its budget: gaussian:clip=…,noise=…,expected=…,"
        "epsilon=…,delta=….",
    )
    downlink_codec: str | None = option(
        None,
        metavar="NAME[:OPTION=VALUE,…]",
        unset="whole weights",
        help="Codec of the change that is published for devices that have the weights before.",
    )
    exact: bool = option(
        False, help="Sum without rounding, so that partials of any grouping finalize to the same weights; slower."
    )
    max_staleness: int = option(
        0, minimum=0, maximum=1000, help="Most rounds by which an update may be late; it counts for less."
    )
    min_updates: int = option(1, minimum=1, help="Valid updates below which the exit code is 4.")
    strict: bool = option(False, help="Stop at the first invalid update, with its exit code.")

    def __post_init__(self) -> None:
        check(self)
        name = self.server_algorithm.name
        if self.clients is not None and name not in COUNTING:
            raise InputError(
                f"expected with algorithm {' or '.join(COUNTING)}, found with {name}; leave it out", key="clients"
            )
        check_merge(self.merge, self.server_algorithm, self.method)
        check_weighting(self.weighting, self.method)
        check_exact(self.exact, self.merge, self.method)
        if self.mechanism is not None:
            from fedpara_edge.aggregation.private import check_private

            check_private(
                algorithm=self.server_algorithm,
                weighting=self.weighting,
                merge=self.merge,
                bounds=self.bounds,
                method=self.method,
            )
            check_late(self.max_staleness, "privacy", "a client could count several times in a round")
        if not self.server_algorithm.takes_late:
            check_late(self.max_staleness, f"algorithm {name}", "the clients would keep something else than the server")
        try:
            _ = self.downlink_encoder
        except InputError as error:
            raise error.about("downlink_codec") from error

    @property
    def server_algorithm(self) -> ServerAlgorithm:
        """The server algorithm with its options."""
        return find_server(self.algorithm, clients=self.clients)

    @property
    def bounds(self) -> Bounds:
        """The bounds on what one client can do."""
        return Bounds(**{name: getattr(self, name) for name in declared(Bounds)})

    @property
    def effective_weighting(self) -> Weighting:
        """The weighting of the updates, the algorithm's own where none was asked for; equal with privacy."""
        return (
            "equal"
            if self.privacy is not None
            else effective_weighting(self.weighting, self.server_algorithm, self.method)
        )

    @property
    def method(self) -> Method:
        """The rule with what belongs to it."""
        mixing = None if self.mixing is None else find_mixing(self.mixing)
        return Method(rule=find_rule(self.rule), mixing=mixing, space=self.space)

    @property
    def mechanism(self) -> Gaussian | None:
        """The noise on the mean; None for none."""
        if self.privacy is None:
            return None
        from fedpara_edge.privacy.mechanism import find_mechanism

        return find_mechanism(self.privacy)

    @property
    def downlink_encoder(self) -> Encoder | None:
        """The codec of the published change; None for whole weights."""
        return None if self.downlink_codec is None else find_encoder(self.downlink_codec)


def check_min_updates(min_updates: int) -> None:
    """Refuse a smallest number of updates that could not be.

    Raises:
        InputError: It is below 1.
    """
    if min_updates < 1:
        raise InputError(f"expected at least 1, found {min_updates}", key="min_updates")


def effective_weighting(weighting: Weighting | None, algorithm: ServerAlgorithm, method: Method) -> Weighting:
    """The weighting that was asked for, or else the algorithm's own; equal where the rule counts no examples."""
    return weighting or (algorithm.weighting if method.weighted else "equal")


def check_weighting(weighting: Weighting | None, method: Method) -> None:
    """Refuse a weighting by examples with a rule that counts none.

    Raises:
        InputError: It does not.
    """
    if weighting == "examples" and not method.weighted:
        mixed = "" if method.mixing is None else f" after mixing {method.mixing.name}"
        raise InputError(
            f"expected equal with rule {method.rule.name}{mixed}, which counts no examples, found examples; leave it "
            "out",
            key="weighting",
        )


def check_merge(merge: Merge, algorithm: ServerAlgorithm, method: Method) -> None:
    """Refuse a way to merge that an algorithm can't go on from, or a rule has no mean for.

    Raises:
        InputError: The algorithm takes no refitted factors, or the rule combines each entry on its own.
    """
    if merge == "refit" and method.sorts:
        raise InputError(
            f"expected mean with rule {method.rule.name}, found refit: it has no mean of the weights", key="merge"
        )
    if merge == "refit" and not algorithm.takes_refit:
        raise InputError(
            f"expected mean with algorithm {algorithm.name}, found refit: what the clients keep would no longer "
            "be what the server keeps",
            key="merge",
        )


def check_late(max_staleness: int, beside: str, reason: str) -> None:
    """Refuse late updates beside what does not go with them.

    Raises:
        InputError: Some may count.
    """
    if max_staleness:
        raise InputError(
            f"expected 0 with {beside}, found {max_staleness}: {reason}; leave it out", key="max_staleness"
        )


def check_exact(exact: bool, merge: Merge, method: Method) -> None:
    """Refuse exact sums, and with them partials, where more than a mean of changes is asked for.

    Raises:
        InputError: The rule, the mixing or the refit needs all updates at once.
    """
    if not exact:
        return
    asked = {"rule": method.rule.name, "mixing": method.mixing and method.mixing.name, "merge": merge}
    for key, found in asked.items():
        if found not in ("mean", None):
            raise InputError(
                f"expected {'none' if key == 'mixing' else 'mean'} in exact sums and partials, found {found}, which "
                "compares all updates of the round; aggregate these themselves, in one pass and without --exact",
                key=key,
            )
