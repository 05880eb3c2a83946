"""The report of a run: `report.html`, which needs no other file, and its figures as PNG.

What the numbers mean is said in `summary`. Figures need matplotlib, of the extra `report`; without it the report has
its tables, and says so. A report is a function of plan and metrics alone: made again, it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

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
from fedpara_edge.report.results import Results, read_results
from fedpara_edge.report.summarizing import summarize
from fedpara_edge.report.summary import Summary
from fedpara_edge.report.units import percent
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.simulation.plan.plan import Plan
from fedpara_edge.storage.atomic import replacing_file

REPORT = "report.html"
CAPTIONS = {
    "accuracy-by-round": "Accuracy by round: mean over the seeds, with a band of one standard deviation.",
    "accuracy-by-bytes": "The same accuracy over all that was sent until then, on a logarithmic axis.",
    "bytes-to-target": "What all participants sent, up and down, until an arm reached the accuracy.",
    "seconds-per-round": "One participant's round: computing as measured here, sending as computed for the rate.",
    "clients": "A point for each client (of all seeds); the box is their middle half, its line their median.",
    "ranks": "Rank of the composed weight of each factored layer when it was last measured, mean over the seeds.",
    "gap": "The gap by round, mean over the seeds, with a band of one standard deviation.",
    "norms": "Frobenius norms by round, mean over the seeds, with a band of one standard deviation.",
}
"""The figures by name, and what each shows."""
NO_FIGURES = "Figures need matplotlib, which is not installed here; type: pip install 'fedpara-edge[report]'"


def write_report(run: Path) -> Path:
    """Write `report.html` and a PNG for each figure into the folder of a run, replacing earlier ones.

    Args:
        run: the folder, with `plan.toml` and `metrics.jsonl`; the run may be unfinished.

    Returns:
        The path of the page.

    Raises:
        InputError: plan or metrics are missing or damaged, or no arm has begun.
        FedparaError: the disk refuses the writing.
    """
    results = read_results(run)
    summary = summarize(results)
    figures = _write_figures(run, summary)
    sections = [section for section in _sections(results.plan, summary, figures) if section.blocks]
    plan = RunFolder(run).plan
    sections.append(Section("", [Source(plan.name, plan.read_text(encoding="utf-8"))]))
    page = run / REPORT
    with replacing_file(page) as temporary:
        temporary.write_text(render(results.plan.name, _subtitle(results), sections), encoding="utf-8")
    return page


def _write_figures(run: Path, summary: Summary) -> Mapping[str, Figure]:
    """Write the PNGs; the figures for the page by name, none without matplotlib."""
    pages: dict[str, Figure] = {}
    if _has_matplotlib():
        from fedpara_edge.report.plots.drawing import draw
        from fedpara_edge.report.plots.style import to_png, to_svg

        for name, figure in draw(summary).items():
            with replacing_file(run / f"{name}.png") as temporary:
                temporary.write_bytes(to_png(figure))
            pages[name] = Figure(to_svg(figure, name, CAPTIONS[name]), CAPTIONS[name])
    for name in CAPTIONS.keys() - pages.keys():
        (run / f"{name}.png").unlink(missing_ok=True)  # of an earlier report, which this one replaces
    return pages


def _has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def _sections(plan: Plan, summary: Summary, figures: Mapping[str, Figure]) -> list[Section]:
    def shown(*names: str) -> list[Block]:
        return [figures[name] for name in names if name in figures]

    notes: list[Block] = [] if _has_matplotlib() else [Text(NO_FIGURES, "note")]
    notes += [] if summary.note is None else [Text(summary.note, "note")]
    for arm in summary.arms:
        notes += [Text(f"{arm.name}, seed {seed}: {why}", "note") for seed, why in arm.unfinished.items()]
    examples = {
        "common": "on the common test set",
        "own": "on the clients' own test examples, each client with its own model where it has one",
    }[plan.evaluated_on]
    accuracy = Text(f"Accuracy is measured {examples}. ± is the standard deviation of the seeds.", "muted")
    targets = " and ".join(percent(target) for target in summary.targets)
    rounds = summary.arm(summary.reference).last_round
    best = f"0.5 and 1 points below the best of {summary.reference} in its {rounds} rounds"
    source = "the plan's target" if summary.is_planned else best
    rule = (
        f"Targets: {targets}, {source}. An arm reaches a target at the first round at which its mean accuracy over the "
        "seeds, smoothed by the evaluated rounds before and after, is at least that high; between two evaluated rounds "
        "it is interpolated. Counted are all files of weights, changes, updates and control variates that all "
        "participants sent and received until then, with the initial weights and without the bundle's graphs, which a "
        "device gets once."
    )
    time = (
        "Computing is what a participant's steps took on the machine of the simulation, without reading and writing "
        "files, mean over rounds; several workers on it slow each other down. Sending is computed: 8 × (bytes "
        "up + bytes down) of a participant and round over the rate."
    )
    gap = (
        "How far the weights that the averaged, or refitted, factors compose to are from the mean of the clients' "
        "composed weights, over how far that mean moved in the round: before the server's own step, and in large "
        "models of a sample of their entries. 0 for dense models."
    )
    one_client = "Where every client has a model of its own, it is that of the first client in all rounds."
    ranks = (
        f"Numerical rank in double precision, of the weight as a matrix: outputs by inputs times kernel. {one_client}"
    )
    return [
        Section("Arms", [*notes, arms_table(summary), accuracy]),
        Section("Accuracy", _with(shown("accuracy-by-round", "accuracy-by-bytes"), accuracy_table(summary))),
        Section("Bytes to an accuracy", _with(shown("bytes-to-target"), *bytes_tables(summary), text=rule)),
        Section("Time of a round", _with(shown("seconds-per-round"), time_table(summary), text=time)),
        Section("Accuracy by client", _with(shown("clients"), clients_table(summary))),
        Section("Ranks of composed weights", _with(shown("ranks"), ranks_table(summary), text=ranks)),
        Section("Aggregation gap", _with(shown("gap"), gap_table(summary), text=gap)),
        Section("Norms", _with(shown("norms"), norms_table(summary), text=one_client)),
    ]


def _with(figures: list[Block], *tables: Table | None, text: str = "") -> list[Block]:
    """Figures, tables and a text about them; nothing if there are neither figures nor tables."""
    blocks = [*figures, *(table for table in tables if table is not None)]
    return [*blocks, Text(text, "muted")] if blocks and text else blocks


def _subtitle(results: Results) -> str:
    plan, about = results.plan, results.arms[0].about
    clients, participants = about.get("clients"), about.get("participants")
    of = f"{participants} of {clients} clients a round" if clients != participants else f"{clients} clients"
    seeds = f"seeds {', '.join(map(str, plan.seeds))}" if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}"
    details = {"dirichlet": f" (α {plan.data.alpha})", "key": f" {plan.data.key}", "shards": f" ({plan.data.shards})"}
    if left_out := about.get("left_out"):
        of += f" ({left_out} with fewer than {plan.data.min_examples} training examples left out)"
    split = f"data {plan.data.path.name} by {plan.data.split}{details.get(plan.data.split, '')}"
    ends = sorted({arm.rounds for arm in plan.arms})
    rounds = f"{ends[0]} rounds" if len(ends) == 1 else f"{ends[0]} to {ends[-1]} rounds"
    return " · ".join([rounds, *([of] if clients is not None else []), split, seeds])
