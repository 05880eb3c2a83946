"""Growth of a run: it goes on with a plan that has more rounds, arms or seeds, and with no other difference.

What counts is what was measured. An arm or a seed without any line in the metrics may still change or vanish, and the
rounds of an arm may be fewer than its plan had, as long as they are more than it has done. Everything else must stay,
so that the run ends with the metrics of one that was made at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpara_edge.errors import InputError, brief_text, counted
from fedpara_edge.simulation.metrics import Event
from fedpara_edge.simulation.plan.plan import Plan, Tables, first_difference, read_plan, read_tables

REMEDY = "a run grows by rounds, arms and seeds alone: take another folder for another plan"


def check_growth(before: Path, now: Path, events: Sequence[Event]) -> None:
    """Refuse a plan that a run can't grow to.

    Args:
        before: Plan of the run.
        now: Plan to go on with.
        events: Metrics of the run.

    Raises:
        InputError: A plan can't be read, or something else differs; the message names it.
    """
    begun = {event["arm"] for event in events}
    done = rounds_done(events)
    most = max(done.values(), default=0)
    old, new = read_plan(before), read_plan(now)
    for name in sorted(begun):
        if name not in {arm.name for arm in new.arms}:
            arm = brief_text(name)
            raise InputError(f"{now}: arms.{arm}: expected this arm, which this run has begun, found none; {REMEDY}")
    seeds = {event["seed"] for event in events}
    if missing := sorted(seeds - set(new.seeds)):
        raise InputError(
            f"{now}: seeds: expected {missing[0]} among them, which this run has begun, found {list(new.seeds)}; "
            f"{REMEDY}"
        )
    found = first_difference(_fixed(read_tables(before), begun), _fixed(read_tables(now), begun))
    if found is not None:
        raise InputError(f"{now}: {found}, and this run has {counted(most, 'round')} of the former; {REMEDY}")
    _check_rounds(now, old, new, events)
    if old.evaluated_on != new.evaluated_on:
        raise InputError(
            f"{now}: arms: expected arms with which all are evaluated on the {_examples(old)} as in the "
            f"{counted(most, 'round')} "
            f"of this run, found some with which all are on the {_examples(new)}; {REMEDY}"
        )


def rounds_done(events: Sequence[Event]) -> Mapping[tuple[str, int], int]:
    """Number of rounds of each arm and seed that has begun."""
    done = {(event["arm"], event["seed"]): 0 for event in events}
    for event in events:
        if event["event"] == "round":
            done[event["arm"], event["seed"]] += 1
    return done


def is_finished(done: Event, rounds: int) -> bool:
    """Whether a federation that came to an end has nothing left to do.

    Args:
        done: Line of the metrics about its end.
        rounds: Rounds that it has in the plan.
    """
    return done.get("diverged") is not None or (done.get("rounds") or 0) >= rounds


def _check_rounds(path: Path, old: Plan, new: Plan, events: Sequence[Event]) -> None:
    # One that diverged would have gone on, and the last round of one that was cut short was measured as any other.
    finished = {(e["arm"], e["seed"]) for e in events if e["event"] == "done" and e.get("diverged") is None}
    for (name, seed), done in rounds_done(events).items():
        least, found = done + ((name, seed) not in finished), new.arm(name).rounds
        if found < least and found != old.arm(name).rounds:
            key = f"arms.{name}.rounds" if "rounds" in read_tables(path)["arms"][name] else "rounds"
            raise InputError(
                f"{path}: {key}: expected at least {least}, as this run has {counted(done, 'round')} of arm {name} "
                "with seed "
                f"{seed}, found {found}; {REMEDY}"
            )


def _fixed(tables: Tables, begun: Collection[str]) -> dict[str, Any]:
    """What may not change: all but rounds, seeds and the arms that have not begun."""
    fixed = {key: value for key, value in tables.items() if key not in ("rounds", "seeds", "arms")}
    arms = {name: table for name, table in tables["arms"].items() if name in begun}
    return fixed | {"arms": {name: {**table, "rounds": None} for name, table in arms.items()}}


def _examples(plan: Plan) -> str:
    return "common test set" if plan.evaluated_on == "common" else "clients' own test shares"
