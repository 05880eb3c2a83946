"""Sections of the report: tables, figures and the sentences that explain them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpara_edge.errors import counted
from fedpara_edge.report.comparison import (
    accuracy_table,
    arms_table,
    bytes_tables,
    clients_table,
    gap_table,
    norms_table,
    ranks_table,
    time_table,
)
from fedpara_edge.report.page import Block, Figure, Section, Source, Table, Text, render
from fedpara_edge.report.results import Results, Unplanned
from fedpara_edge.report.summary import Summary
from fedpara_edge.report.units import percent
from fedpara_edge.simulation.folder import PLAN

EVALUATED_ON = {
    "common": "on the common test set",
    "own": "on the clients' own test examples, each client with its own model where it has one",
}
TIME = (
    "Computing is the time of a participant's training steps on the machine of the simulation, without reading and "
    "writing files, mean over rounds; workers that share the machine slow each other down. Sending is computed: "
    "8 × (bytes up + bytes down) of a participant and round, divided by the rate."
)
GAP = (
    "Distance between the weights that the averaged (or refitted) factors compose and the mean of the clients' "
    "composed weights, relative to how far that mean moved in the round: before the server's own step, and in large "
    "models on a sample of the entries. 0 for dense models."
)
ONE_CLIENT = "Where every client has a model of its own, this is the first client's, in all rounds."
RANKS = f"Numerical rank, in double precision, of the weight as a matrix of outputs by inputs × kernel. {ONE_CLIENT}"


def page_of(
    results: Results, summary: Summary, figures: Mapping[str, Figure], *, notes: Sequence[str], source: str | None
) -> str:
    """HTML page of a run.

    Args:
        results: Measurements of the run.
        summary: Summary of the measurements.
        figures: Figures to show, by name.
        notes: Warnings that stand at the top.
        source: Text of the plan; None for a run without one.
    """
    found = [section for section in _sections(results, summary, figures, notes) if section.blocks]
    plan = [] if source is None else [Section("", [Source(PLAN, source)])]
    return render(results.plan.name, _subtitle(results), [*found, *plan])


def _sections(results: Results, summary: Summary, figures: Mapping[str, Figure], notes: Sequence[str]) -> list[Section]:
    def shown(*names: str) -> list[Block]:
        return [figures[name] for name in names if name in figures]

    top = [Text(note, "note") for note in notes]
    place = EVALUATED_ON[results.plan.evaluated_on]
    accuracy = Text(f"Accuracy is measured {place}. ± is the standard deviation of the seeds.", "muted")
    return [
        Section("Arms", [*top, arms_table(summary), accuracy]),
        Section("Accuracy", _with(shown("accuracy-by-round", "accuracy-by-bytes"), accuracy_table(summary))),
        Section("Bytes to an accuracy", _with(shown("bytes-to-target"), *bytes_tables(summary), text=_rule(summary))),
        Section("Time of a round", _with(shown("seconds-per-round"), time_table(summary), text=TIME)),
        Section("Accuracy by client", _with(shown("clients"), clients_table(summary))),
        Section("Ranks of composed weights", _with(shown("ranks"), ranks_table(summary), text=RANKS)),
        Section("Aggregation gap", _with(shown("gap"), gap_table(summary), text=GAP)),
        Section("Norms", _with(shown("norms"), norms_table(summary), text=ONE_CLIENT)),
    ]


def _with(figures: list[Block], *tables: Table | None, text: str = "") -> list[Block]:
    """Figures, tables and a text about them; empty if there are neither figures nor tables."""
    blocks = [*figures, *(table for table in tables if table is not None)]
    return [*blocks, Text(text, "muted")] if blocks and text else blocks


def _rule(summary: Summary) -> str:
    """Rule by which an arm reaches a target, and which bytes count until then."""
    targets = " and ".join(percent(target) for target in summary.targets)
    rounds = summary.arm(summary.reference).last_round
    best = f"0.5 and 1 points below the smoothed best of {summary.reference} in its {counted(rounds, 'round')}"
    origin = "the plan's target" if summary.is_planned else best
    return (
        f"Targets: {targets}, {origin}. An arm reaches a target at the first round at which its smoothed accuracy, the "
        "mean of an evaluated round and its two neighbours, is at least that high, interpolated between two evaluated "
        "rounds. The bytes are those of all files of weights, changes, updates and control variates that all "
        "participants sent and received until then, including the initial weights but not the bundle's graphs, which a "
        "device gets once."
    )


def _subtitle(results: Results) -> str:
    plan, about = results.plan, results.arms[0].about
    clients, participants = about.get("clients"), about.get("participants")
    of = counted(clients or 0, "client")
    if participants != clients:
        of = f"{participants} of {of} a round"
    if isinstance(plan, Unplanned):
        return " · ".join([counted(max(results.arms[0].seeds[0].rounds, default=0), "round"), of])
    seeds = f"seeds {', '.join(map(str, plan.seeds))}" if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}"
    details = {"dirichlet": f" (α {plan.data.alpha})", "key": f" {plan.data.key}", "shards": f" ({plan.data.shards})"}
    if left_out := about.get("left_out"):
        of += f" ({left_out} with fewer than {plan.data.min_examples} training examples left out)"
    split = f"data {plan.data.path.name} by {plan.data.split}{details.get(plan.data.split, '')}"
    ends = sorted({arm.rounds for arm in plan.arms})
    rounds = counted(ends[0], "round") if len(ends) == 1 else f"{ends[0]} to {counted(ends[-1], 'round')}"
    return " · ".join([rounds, *([of] if clients is not None else []), split, seeds])
