"""Zoo check: every architecture of `architectures/` is exported and trained, on several seeds, by both engines.

make zoo-check                             # writes benchmarks/zoo_check.md, from where it stopped
python benchmarks/zoo_check.py --only GPT,BERT --seeds 1
"""

from __future__ import annotations

import copy
import functools
import gc
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from architectures import ARCHITECTURES, Architecture
from numpy.typing import NDArray
from parts import keep_options, machine, measure_parts
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from device_runtime.engines.registry import open_engine
from export import export_bundle
from export.batches import Batch, Batches
from export.forward.preprocess import Preprocessing
from export.reference import loss_in_torch
from export.verify import Verification
from fedpara_edge.errors import FedparaError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.bundle import ENGINES, Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import convert

HERE = Path(__file__).parent
ABOUT = """\
An architecture is factored with the defaults and exported, which verifies it against torch in double precision; then
each engine and torch in float32 take five steps of SGD from the same weights, and are compared with torch in double
precision: `trained` and `torch float32` are ‖w - w64‖ / ‖w64 - w0‖ over all weights, `times` is the first over the
second. All are the largest over the seeds. A distance far above or below torch's comes from a rectifier whose input is
within rounding of zero: torch in double precision, its weights moved by as much as float32 rounds, goes 8e-4 astray in
1 of 12 draws on MobileNetV1, and 6e-3 in 2 of 12 on MobileNetV3. A model is refused for a lack of operators, never for
rounding.
"""
STEPS, ROWS, SEEDS = 5, 8, 5
HEADER = ("model", "engine", "verified", "error", "trained", "torch float32", "times", "compression")


def share_operators() -> None:
    """Make torch.onnx's table of operators once for all exports, rather than anew for each: 0.5 s."""
    make = functools.cache(ONNXRegistry.from_torchlib)

    def copied(**options: Any) -> ONNXRegistry:
        found = copy.copy(make(**options))
        found.functions = {operator: [*functions] for operator, functions in found.functions.items()}
        return found

    ONNXRegistry.from_torchlib = staticmethod(copied)


def check(architecture: Architecture, seed: int) -> list[dict[str, Any]]:
    """A row for each engine: what the export measured and how far its training is from torch's, or why it refuses."""
    torch.manual_seed(seed)
    given = {} if architecture.batchnorm is None else {"batchnorm": architecture.batchnorm}
    model, _ = convert(architecture.make(), Factorization(**given))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        exported = _export(model, architecture, seed, ENGINES, Path(folder) / "all")
        for engine in ENGINES:
            if isinstance(exported, FedparaError):  # which another engine need not share
                found = _export(model, architecture, seed, (engine,), Path(folder) / engine)
            else:
                found = exported
            if isinstance(found, FedparaError):
                rows.append({"engine": engine, "refused": str(found)})
                continue
            bundle, verification = found
            layout = bundle.manifest.layout
            measured = {"error": verification[engine].worst, "limit": verification[engine].limit}
            share = {"compression": layout.dense_parameters / layout.shared_parameters}
            trained = train(bundle, engine, model, architecture, seed)
            rows.append({"engine": engine, **measured, **trained, **share})
    gc.collect()
    return rows


def _export(
    model: nn.Module, architecture: Architecture, seed: int, engines: tuple[str, ...], folder: Path
) -> tuple[Bundle, dict[str, Verification]] | FedparaError:
    config = ExportConfig(
        name=architecture.name,
        input_shape=architecture.shape,
        input_dtype="int64" if architecture.tokens else "float32",
        tokens=architecture.tokens,
        loss=(architecture.loss,),
        engines=engines,
        seed=seed,
    )
    try:
        return export_bundle(model, folder, config)
    except FedparaError as error:
        return error


def train(bundle: Bundle, engine: str, model: nn.Module, architecture: Architecture, seed: int) -> dict[str, float]:
    """Distances of an engine and of torch in float32 from torch in double precision after `STEPS` steps."""
    interface = bundle.manifest.interface
    preprocessings = [Preprocessing(spec.dtype, spec.shape) for spec in interface.inputs]
    source = Batches(inputs=interface.inputs, preprocessings=preprocessings, heads=interface.heads, seed=seed)
    batches = [source.draw(ROWS, 1000 + step) for step in range(STEPS)]
    runner = open_engine(bundle, engine, threads=1)
    for batch in batches:
        runner.step(batch.inputs, batch.labels, learning_rate=architecture.rate, seed=0)
    before = {name: value.detach().double().numpy().copy() for name, value in model.named_parameters()}
    double, single = (train_torch(model, bundle, batches, architecture.rate, dtype) for dtype in DTYPES)
    names = sorted(runner.read())
    moved = distance(double, before, names)
    return {
        "trained": distance({**runner.read()}, double, names) / moved,
        "torch": distance(single, double, names) / moved,
    }


DTYPES = (torch.float64, torch.float32)


def train_torch(
    model: nn.Module, bundle: Bundle, batches: Sequence[Batch], rate: float, dtype: torch.dtype
) -> dict[str, NDArray[Any]]:
    """Weights by name after torch's own steps."""
    heads = bundle.manifest.interface.heads
    copied = copy.deepcopy(model).to(dtype).eval()
    trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    for batch in batches:
        (x,) = (torch.from_numpy(array) for array in batch.inputs.values())
        outputs = {heads[0].output.name: copied(x.to(dtype) if x.is_floating_point() else x)}
        optimizer.zero_grad()
        loss_in_torch(heads, outputs, {name: torch.from_numpy(y) for name, y in batch.labels.items()}).backward()
        optimizer.step()
    return {name: value.detach().double().numpy() for name, value in copied.named_parameters()}


def distance(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]], names: Sequence[str]) -> float:
    """‖one - other‖ over the named tensors."""
    return float(np.sqrt(sum(np.sum((one[name].astype(np.float64) - other[name]) ** 2) for name in names)))


def report(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Table of the results so far, as Markdown, by architecture and engine."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for part, rows in results.items():
        for row in rows:
            found.setdefault((part.rpartition(", seed ")[0], row["engine"]), []).append(row)
    order = {name: number for number, name in enumerate(ARCHITECTURES)}
    lines = [HEADER, ("---",) * len(HEADER)]
    refusals: dict[str, str] = {}
    for (name, engine), rows in sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        good = [row for row in rows if "refused" not in row]
        verified = f"{len(good)} of {len(rows)}"
        if len(good) < len(rows):
            text = next(row["refused"] for row in rows if "refused" in row)
            number = refusals.setdefault(f"{name}, {engine}: {text}", str(len(refusals) + 1))
            verified = f"{verified}, refused [{number}]"
        cells = [name, engine, verified]
        if good:
            times = max(row["trained"] / max(row["torch"], 1e-9) for row in good)
            worst = {key: max(row[key] for row in good) for key in ("error", "trained", "torch")}
            cells += [f"{worst['error']:.0e}", f"{worst['trained']:.0e}", f"{worst['torch']:.0e}", f"{times:.1f}"]
            cells.append(f"{good[0]['compression']:.1f}x")
        lines.append((*cells, *["-"] * (len(HEADER) - len(cells))))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"{number}. {refusal}" for refusal, number in refusals.items())
    return f"{text}\n\nRefused:\n\n{notes}" if notes else text


def write_table(results: Mapping[str, Any], total: int, output: Path) -> None:
    """Write the results so far, of so many in all."""
    seeds = sorted({part.rpartition(", seed ")[2] for part in results})
    names = {part.rpartition(", seed ")[0] for part in results}
    measured = f"{len(names)} architectures, seeds {', '.join(seeds)}: {len(results)} of {total} parts measured"
    text = f"# Results of `make zoo-check`\n\n{machine()}\n\n{measured}\n\n{ABOUT}\n{report(results)}\n"
    output.write_text(text, encoding="utf-8")


@click.command()
@click.option("--only", help="Names of architectures, separated by commas.  [default: all]")
@click.option("--seeds", type=int, default=SEEDS, show_default=True, help="Number of seeds.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "zoo_check.md", help="Table to write.")
@keep_options
def main(only: str | None, seeds: int, output: Path, kept: Path | None, again: bool) -> None:
    """Export and train every architecture, and write the table whenever a part is done."""
    torch.set_num_threads(1)
    share_operators()
    names = only.split(",") if only else list(ARCHITECTURES)
    parts = {
        f"{name}, seed {seed}": partial(check, ARCHITECTURES[name], seed) for seed in range(seeds) for name in names
    }

    def written(results: Mapping[str, Any]) -> str:
        write_table(results, len(parts), output)
        return report(results)

    measure_parts(
        parts,
        written,
        settings={"steps": STEPS, "rows": ROWS},
        kept=kept or HERE / ".kept" / "zoo_check.json",
        again=again,
    )


if __name__ == "__main__":
    main()
