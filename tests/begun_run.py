"""Runs of the tiny plan whose bundles are there already, for tests: to verify each is slow."""

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from small_net import without_verification

from export import make_bundle
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.simulation.plan.plan import read_plan


def begin_run(plan: Path, run: Path, arms: Collection[str] = ()) -> None:
    """Make a run folder of a plan in which the bundles of some arms are there already; of all if none is named."""
    with without_verification():
        for arm in read_plan(plan).arms:
            if not arms or arm.name in arms:
                bundle = RunFolder(run).job(arm.name, 4).bundle
                bundle.parent.mkdir(parents=True)
                make_bundle(replace(arm.model, seed=4), bundle)
    shutil.copy(plan, run)
