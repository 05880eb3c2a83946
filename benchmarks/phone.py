"""Training on the phone's page, in headless Chromium on one thread, against native onnxruntime and TensorFlow.js.

    python benchmarks/phone.py --models mlp,cnn --json phone.json

`fedpara-edge serve` hands out the page as a phone gets it, in brotli. Steps are those of the page's own modules on one
batch; page and native engine take turns in the same run, each of some steps, after three seconds in which the browser's
compiler gets to know the model. TensorFlow.js takes turns with the page as well, on the dense model, from the same
weights on the same batch, by its backend in WebAssembly and by its plain one; that it takes the same step is seen from
the first losses, or this ends with an error. A start begins with a browser that has nothing of the page, opens the join
link, picks a file of examples and ends with the first step. Columns:

    page MiB     resident memory of the browser's process with the page, at its highest
    wire MB      files of the page in brotli, and of them onnxruntime's WebAssembly
    tfjs ms      milliseconds of a step of TensorFlow.js, or the kernel that its backend lacks for one
    over dense   those over the page's on the same dense model, and over the page's on that of FedPara

It needs Chromium (or CHROMIUM, its path), Node.js and `make web`; without them it says so and measures nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from parts import keep_options, measure_parts, write_rows

from device_runtime import open_data, open_engine
from fedpara_edge.cli.output import table
from fedpara_edge.formats.bundle import Bundle, open_bundle

HERE = Path(__file__).parent
WEB = HERE.parent / "device_runtime" / "web"
BATCHES = {"mlp": 32, "cnn": 32, "har-transformer": 32, "char-lstm": 8, "resnet18": 8}
START_MODEL = "cnn"
TFJS_MODELS, BACKENDS, OWN = ("mlp", "cnn"), ("wasm", "cpu"), ("dense", "fedpara")
LOSSES, ALIKE = 3, 1e-4
RATE = 0.01  # as in phone_runtimes.mjs
WARM_UP_SECONDS = 3.0
TURN_SECONDS = 0.5
TARGET_RATIO, TARGET_MB, TARGET_SECONDS = 3.0, 4.0, 4.0

Ask = Callable[..., Any]


def missing() -> str | None:
    """What is not here that a page needs, in a sentence; None if all is."""
    for what, found, remedy in (
        ("Chromium", chromium(), "sudo apt install chromium, or set CHROMIUM to its path"),
        ("Node.js", node(), "make web"),
        ("the packages of the page", (WEB / "node_modules" / "ready").exists() or None, "make web"),
    ):
        if found is None:
            return f"phone.py: expected {what}, found none; run: {remedy}"
    return None


def chromium() -> str | None:
    """Path of the browser."""
    names = [os.environ["CHROMIUM"]] if "CHROMIUM" in os.environ else ["chromium", "chromium-browser", "google-chrome"]
    return next(filter(None, map(shutil.which, names)), None)


def node() -> str | None:
    """Path of Node.js: that of this environment, or another."""
    return shutil.which("node", path=str(Path(sys.executable).parent)) or shutil.which("node")


@contextmanager
def browsing() -> Iterator[Ask]:
    """A browser, and the function that has it do something (`phone.mjs`)."""
    command = [str(node()), str(HERE / "phone.mjs"), str(chromium())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(action: str, argument: Any = None) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([action, argument]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            yield ask
        finally:
            process.stdin.close()


@contextmanager
def serving(folder: Path, bundle: Path, page: Path) -> Iterator[str]:
    """A server with the page, and its join link."""
    with tempfile.TemporaryDirectory(dir=folder) as state:
        command = [sys.executable, "-m", "fedpara_edge", "serve", str(bundle), "--state", f"{state}/server"]
        options = ["--port", "0", "--updates", "1", "--page", str(page)]
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().strip()
            finally:
                process.terminate()


@cache
def page_in(folder: Path) -> Path:
    """The page, built in a folder, with the modules that measure on it beside it, in `beside/`."""
    page, packages = folder / "page", WEB / "node_modules"
    subprocess.run([str(node()), str(WEB / "build.mjs"), str(page), "--compress"], check=True)
    bundler = [str(node()), str(packages / "esbuild" / "bin" / "esbuild"), str(HERE / "phone_runtimes.mjs")]
    options = ["--bundle", "--format=esm", "--log-level=warning", f"--outfile={page / 'beside' / 'phone_runtimes.mjs'}"]
    subprocess.run([*bundler, *options], check=True, env={**os.environ, "NODE_PATH": str(packages)})
    for file in (packages / "@tensorflow" / "tfjs-backend-wasm" / "dist").glob("*.wasm"):
        shutil.copy(file, page / "beside")
    return page


def export(model: str, folder: Path, kind: str = "fedpara") -> Bundle:
    """Bundle of a model of the zoo with a batch of random examples, `data.npz`, beside its files."""
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "fedpara_edge", "export", model, "--kind", kind, "--engines", "onnxruntime"]
        subprocess.run([*command, "-o", str(folder)], check=True, capture_output=True)
    bundle, random = open_bundle(folder), np.random.default_rng(0)
    arrays = {}
    for spec in (*bundle.interface.inputs, *bundle.interface.labels):
        shape = (BATCHES[model], *spec.shape)
        is_float = spec.dtype == "float32"
        drawn = random.standard_normal(shape) if is_float else random.integers(0, spec.classes or 256, shape)
        arrays[spec.name] = drawn.astype(spec.dtype)
    np.savez(folder / "data.npz", **arrays)
    return bundle


def measure_steps(model: str, folder: Path, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a step of a model on the page and natively, and the memory of the page."""
    page = page_in(folder)
    bundle = export(model, page / "models" / model)
    data = open_data(bundle.path / "data.npz", bundle.manifest)
    x, y = data.rows(np.arange(data.examples))
    engine = open_engine(bundle, "onnxruntime", threads=1)

    def native(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            engine.step(x, y, learning_rate=RATE, seed=0)
        return 1000 * (time.perf_counter() - started) / count

    with serving(folder, bundle.path, page) as link, browsing() as ask:
        on_page = OnPage(ask, link)
        on_page.open("page", model)
        ms = _medians({"native": native, "page": partial(on_page.step_ms, "page")}, repetitions)
        mib = ask("memory")
    return {"model": model, "batch": BATCHES[model], "ms": ms, "ratio": ms["page"] / ms["native"], "page_mib": mib}


class OnPage:
    """What is measured on a page: steps of runtimes, by name (`phone_runtimes.mjs`)."""

    def __init__(self, ask: Ask, link: str) -> None:
        self._ask, self._address = ask, link.partition("#")[0]
        ask("site", self._address)

    def open(self, name: str, model: str) -> None:
        """Open a model of the folder `models` in the modules of the page."""
        self._call("openOnPage", name, f"{self._address}models/{model}/")

    def open_in_tfjs(self, name: str, model: str, backend: str) -> None:
        """Open one in TensorFlow.js."""
        self._call("openInTfjs", name, f"{self._address}models/{model}/", backend)

    def losses(self, name: str, count: int) -> list[float]:
        """Losses of some steps."""
        losses: list[float] = self._call("takeSteps", name, count)["losses"]
        return losses

    def step_ms(self, name: str, count: int) -> float:
        """Milliseconds of a step, over some of them."""
        return float(self._call("takeSteps", name, count)["ms"])

    def _call(self, function: str, *arguments: Any) -> Any:
        found = self._ask("call", [f"{self._address}beside/phone_runtimes.mjs", function, *arguments])
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(f"{function} on the page: {found['error']}")
        return found


def measure_tfjs(model: str, folder: Path, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a step of TensorFlow.js on a dense model, and of the page on it and on that of FedPara."""
    page = page_in(folder)
    dense = export(model, page / "models" / f"dense-{model}", kind="dense")
    export(model, page / "models" / model)
    with serving(folder, dense.path, page) as link, browsing() as ask:
        on_page = OnPage(ask, link)
        for name, opened in zip(OWN, (f"dense-{model}", model), strict=True):
            on_page.open(name, opened)
        losses, names, unable = on_page.losses("dense", LOSSES), [*OWN], {}
        for backend in BACKENDS:
            on_page.open_in_tfjs(backend, f"dense-{model}", backend)
            try:
                found = on_page.losses(backend, LOSSES)
            except RuntimeError as error:
                if (kernel := re.search(r"Kernel '(\w+)' not registered for backend", str(error))) is None:
                    raise
                unable[backend] = kernel[1]
                continue
            if not np.allclose(found, losses, rtol=ALIKE, atol=0):
                raise click.ClickException(f"{model}: TensorFlow.js on {backend} has the losses {found}, not {losses}")
            names.append(backend)
        ms = _medians({name: partial(on_page.step_ms, name) for name in names}, repetitions)
    over = {backend: {own: ms[backend] / ms[own] for own in OWN} for backend in BACKENDS if backend in ms}
    return {"tfjs": model, "batch": BATCHES[model], "ms": ms, "over": over, "unable": unable}


def _medians(runtimes: Mapping[str, Callable[[int], float]], repetitions: int) -> dict[str, float]:
    """Medians of the milliseconds of steps that take turns."""
    counts = {name: _turn(step) for name, step in runtimes.items()}
    turns = [{name: step(counts[name]) for name, step in runtimes.items()} for _ in range(repetitions)]
    return {name: statistics.median(turn[name] for turn in turns) for name in runtimes}


def _turn(step: Callable[[int], float]) -> int:
    """Number of steps in a turn, after some seconds of them."""
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_UP_SECONDS:
        ms = step(1)
    return max(1, round(1000 * TURN_SECONDS / ms))


def measure_start(folder: Path, repetitions: int) -> dict[str, Any]:
    """Seconds from a cold start of the page to the first step, and the bytes that the page takes on the wire."""
    page = page_in(folder)
    own = {file: file.stat().st_size / 1e6 for file in page.rglob("*.br")}
    wasm = sum(size for file, size in own.items() if ".wasm" in file.suffixes)
    bundle = export(START_MODEL, folder / "start")
    with serving(folder, bundle.path, page) as link, browsing() as ask:
        seconds = [ask("start", [link, str(bundle.path / "data.npz")]) for _ in range(repetitions)]
        mib = ask("memory")
    return {
        "start": START_MODEL,
        "seconds": statistics.median(seconds),
        "wire_mb": sum(own.values()),
        "wasm_mb": wasm,
        "page_mib": mib,
    }


def report(parts: Mapping[str, Any]) -> str:
    """The measurements as text."""
    steps = [
        (
            row["model"], row["batch"], f"{row['ms']['page']:.1f}", f"{row['ms']['native']:.1f}", f"{row['ratio']:.2f}",
            f"{row['page_mib']:.0f}",
        )
        for row in parts.values() if "ratio" in row
    ]  # fmt: skip
    starts = [
        (
            row["start"], f"{row['seconds']:.1f}", f"{row['wire_mb']:.2f}", f"{row['wasm_mb']:.2f}",
            f"{row['page_mib']:.0f}",
        )
        for row in parts.values() if "start" in row
    ]  # fmt: skip
    others = [
        (
            row["tfjs"], row["batch"], backend,
            f"{row['ms'][backend]:.1f}" if backend in row["ms"] else f"no {row['unable'][backend]}",
            *(f"{row['over'][backend][own]:.2f}" if backend in row["over"] else "" for own in OWN),
            *(f"{row['ms'][own]:.1f}" for own in OWN),
        )
        for row in parts.values() if "tfjs" in row for backend in BACKENDS
    ]  # fmt: skip
    step_columns = ("model", "batch", "page ms", "native ms", f"ratio (target {TARGET_RATIO})", "page MiB")
    start_columns = (
        "model", f"seconds (target {TARGET_SECONDS:.0f})", f"wire MB (target {TARGET_MB:.0f})", "wasm MB", "page MiB",
    )  # fmt: skip
    other_columns = ("model", "batch", "backend", "tfjs ms", "over dense", "over FedPara", "dense ms", "FedPara ms")
    tables = (
        ("a step, one thread each, in turns (medians)", step_columns, steps),
        ("a step of TensorFlow.js and of the page, one thread each, in turns (medians)", other_columns, others),
        ("from a cold start of the page to the first step", start_columns, starts),
    )
    return "\n\n".join(f"{title}\n\n{table(columns, rows)}" for title, columns, rows in tables if rows)


@click.command()
@click.option("--models", default=",".join(BATCHES), show_default=True)
@click.option("--repetitions", default=7, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="File for the numbers.")
@keep_options
def main(models: str, repetitions: int, output: Path | None, kept: Path | None, again: bool) -> None:
    """Measure, print the tables, and write them as JSON."""
    if (sentence := missing()) is not None:
        click.echo(sentence)
        return
    chosen = models.split(",")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts: dict[str, Callable[[], Any]] = {
            "start of the page": partial(measure_start, folder, min(repetitions, 3)),
            **{f"step of {model}": partial(measure_steps, model, folder, repetitions) for model in chosen},
            **{
                f"TensorFlow.js on {model}": partial(measure_tfjs, model, folder, repetitions)
                for model in TFJS_MODELS
                if model in chosen
            },
        }
        measured = measure_parts(parts, report, settings={"repetitions": repetitions}, kept=kept, again=again)
    click.echo(report(measured))
    write_rows(output, measured.values())


if __name__ == "__main__":
    main()
